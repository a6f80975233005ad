"""LLaDA: a masked diffusion transformer with full bidirectional attention (Nie et al. 2025, arXiv 2502.09992).

Serves LLaDA-8B-Base and -Instruct, LLaDA 1.5 (arXiv 2505.19223) and UltraLLaDA (arXiv 2510.10481), which differs by its rope_theta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhub.networks.decoder import Decoder, Names, Published, Shape
from rlhub.networks.profile import Profile

ARCHITECTURES = ("LLaDAModelLM",)
NAMES = Names(
    embedding="model.transformer.wte",
    layers="model.transformer.blocks",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    attention_norm="attn_norm",
    mlp_norm="ff_norm",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="attn_out",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
)
LORA_TARGETS = NAMES.lora_targets
END_OF_TURN = 126348  # <|eot_id|>, which config.json does not name
TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "vocab_size": 24, "max_sequence_length": 256}


@dataclass(frozen=True)
class Config(Published):
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
    init_std: float = 0.02

    ARCHITECTURES = ARCHITECTURES
    MODEL_TYPE = "llada"
    FIXED: ClassVar[dict[str, Any]] = {
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "rope_full_precision": True,
        "block_group_size": 1,
        "alibi": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "multi_query_attention": None,
        "clip_qkv": None,
    }

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_heads={self.n_heads}: rotary embedding pairs dimensions")
        if self.n_heads % (self.n_kv_heads or self.n_heads):
            raise ValueError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")

    def shape(self) -> Shape:
        """The sizes that the stack is built from, in the words of `Shape`."""
        return Shape(
            width=self.d_model,
            num_layers=self.n_layers,
            num_heads=self.n_heads,
            num_kv_heads=self.n_kv_heads or self.n_heads,
            head_dim=self.d_model // self.n_heads,
            mlp_width=self.mlp_hidden_size,
            vocab_size=self.vocab_size,
            num_embeddings=self.embedding_size or self.vocab_size,
            max_length=self.max_sequence_length,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tied=self.weight_tying,
            init_std=self.init_std,
        )

    def resolved(self) -> dict[str, Any]:
        return {"embedding_size": self.embedding_size or self.vocab_size, "n_kv_heads": self.n_kv_heads or self.n_heads}


class LLaDA(Decoder):
    """The network behind `rlhub.load_model` for LLaDA checkpoints."""

    def __init__(self, config: Config) -> None:
        profile = Profile(
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            stop_ids=config.stop_ids(END_OF_TURN),
            pad_id=config.pad_token_id,
            lora_targets=LORA_TARGETS,
        )
        super().__init__(config, profile, NAMES)


build = LLaDA
