"""LLaDA: a masked diffusion transformer with full bidirectional attention (Nie et al. 2025, arXiv 2502.09992).

Covers checkpoints with `architectures: [LLaDAModelLM]`: LLaDA-8B-Base and -Instruct, LLaDA 1.5, UltraLLaDA. Module names follow the
published tensor names, so a state dict goes in and out unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.errors import CheckpointError
from rlhub.models.layers import PaddedRows, RMSNorm, attend, rotary_tables, rotate
from rlhub.types import Layout

ARCHITECTURES = ("LLaDAModelLM",)
LOGIT_SHIFT = 0
LORA_TARGETS = r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"


@dataclass(frozen=True)
class Config:
    """The fields of the published config.json that shape the network. `vocab_size` may be smaller than `embedding_size`."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    mlp_hidden_size: int = 352
    vocab_size: int = 32
    embedding_size: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 4096
    mask_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 1
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_heads={self.n_heads}: rotary embedding pairs dimensions")
        if self.n_heads % self.num_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Config:
        """Read a published config.json; layouts that this code does not compute are refused.

        Raises:
            CheckpointError: the config asks for another block type, norm, activation, ALiBi, biases or QK norm, or makes no network.
        """
        expected = {
            "block_type": "llama",
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "rope": True,
            "rope_full_precision": True,
            "block_group_size": 1,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"LLaDA config has {key}={config[key]!r}; only {value!r} is supported")
        for key in (
            *("alibi", "include_bias", "include_qkv_bias", "attention_layer_norm", "input_emb_norm"),
            *("scale_logits", "multi_query_attention", "clip_qkv"),
        ):
            if config.get(key):
                raise CheckpointError(f"LLaDA config has {key}={config[key]!r}, which is not supported")
        types = {"int": int, "int | None": int | None, "float": int | float, "bool": bool}
        known = {f.name: f.type for f in fields(cls) if f.name in config}
        for key, kind in known.items():
            if not isinstance(config[key], types[kind]):
                raise CheckpointError(f"LLaDA config has {key}={config[key]!r}; expected {kind}")
        try:
            return cls(**{key: config[key] for key in known})
        except ValueError as error:
            raise CheckpointError(f"LLaDA config has {error}") from None

    @property
    def num_embeddings(self) -> int:
        return self.embedding_size or self.vocab_size

    @property
    def num_kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    def to_published(self) -> dict[str, Any]:
        """The config.json of the family's Hugging Face layout."""
        return {
            "architectures": list(ARCHITECTURES),
            "model_type": "llada",
            "block_type": "llama",
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "rope": True,
            "alibi": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "embedding_size": self.num_embeddings,
            "n_kv_heads": self.num_kv_heads,
        }


class Block(nn.Module):
    """Pre-norm attention and SwiGLU: `ff_proj` is the gate, `up_proj` the value, `ff_out` the way down."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, head_dim = config.d_model, config.d_model // config.n_heads
        kv_width = head_dim * config.num_kv_heads
        self.head_dim = head_dim
        self.groups = config.n_heads // config.num_kv_heads
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def forward(self, hidden: Tensor, tables: tuple[Tensor, Tensor], rows: PaddedRows) -> Tensor:
        normed = self.attn_norm(hidden)
        query = rotate(self.q_proj(normed).unflatten(-1, (-1, self.head_dim)), tables)
        key = rotate(self.k_proj(normed).unflatten(-1, (-1, self.head_dim)), tables)
        value = self.v_proj(normed).unflatten(-1, (-1, self.head_dim))
        if self.groups > 1:
            key, value = (part.repeat_interleave(self.groups, dim=1) for part in (key, value))
        hidden = hidden + self.attn_out(attend(query, key, value, rows))
        normed = self.ff_norm(hidden)
        return hidden + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDA(nn.Module):
    """The network behind `rlhub.load_model` for LLaDA checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.num_embeddings, config.d_model),
                "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            transformer["ff_out"] = nn.Linear(config.d_model, config.num_embeddings, bias=False)
        self.model = nn.ModuleDict({"transformer": transformer})

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def eos_id(self) -> int:
        return self.config.eos_token_id

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_sequence_length

    def initialize(self, generator: torch.Generator) -> LLaDA:
        """Draw fresh weights: normal(0, init_std), residual outputs scaled by 1 / sqrt(2 n_layers) as in OLMo's "mitchell" scheme."""
        residual = (2 * self.config.n_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                    continue
                to_residual = ".blocks." in name and name.endswith(("attn_out.weight", "ff_out.weight"))
                scale = residual if to_residual else 1.0
                parameter.normal_(0.0, self.config.init_std * scale, generator=generator)
        return self

    def denoise(self, tokens: Tensor, layout: Layout) -> Tensor:
        """int [T] -> hidden states [T, D] of the packed rows, after the final norm."""
        transformer = self.model["transformer"]
        rows = PaddedRows.of(layout)
        head_dim = self.config.d_model // self.config.n_heads
        tables = rotary_tables(layout.position_ids, head_dim, self.config.rope_theta)
        hidden = transformer["wte"](tokens.long())
        for block in transformer["blocks"]:
            hidden = block(hidden, tables, rows)
        return transformer["ln_f"](hidden)

    def head(self, hidden: Tensor, target_rows: Tensor) -> Tensor:
        """Logits [M, V] that predict the tokens at packed positions `target_rows` [M]; padding rows of the embedding are cut off."""
        transformer = self.model["transformer"]
        selected = hidden[target_rows]
        # A matrix product with one row takes another kernel, whose rounding differs from that of a batch.
        alone = len(target_rows) == 1
        selected = selected.repeat(2, 1) if alone else selected
        logits = F.linear(selected, transformer["wte"].weight) if self.config.weight_tying else transformer["ff_out"](selected)
        return (logits[:1] if alone else logits)[:, : self.config.vocab_size]


build = LLaDA
