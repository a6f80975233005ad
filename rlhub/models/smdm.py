"""SMDM's masked diffusion language models, 6M to 1B parameters (Nie et al. 2024, arXiv 2410.18514).

Their repository holds bare weight files with lit-gpt's tensor names. To load one, put it into a folder as `model.safetensors` beside a
config.json with `"architectures": ["TransEncoder"]` and the size's fields in lit-gpt's words. The embedding has one row more than the
tokenizer has tokens, for the mask; the output head has not, so the mask's logit is a constant here that gives it probability 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.models.radd import NEVER, check_mask
from rlhub.networks.decoder import Block, Decoder, Names, Published, Shape
from rlhub.networks.profile import Profile

ARCHITECTURES = ("TransEncoder",)
NAMES = Names(
    embedding="transformer.wte",
    layers="transformer.h",
    norm="transformer.ln_f",
    attention_norm="norm_1",
    mlp_norm="norm_2",
    qkv="attn.attn",
    output="attn.proj",
    gate="mlp.swiglu.w1",
    up="mlp.swiglu.w2",
    down="mlp.swiglu.w3",
)
TINY = {"block_size": 64, "vocab_size": 15, "n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 32, "intermediate_size": 48}


@dataclass(frozen=True)
class Config(Published):
    """The fields of lit-gpt's config that shape the network. `vocab_size` counts the tokenizer's tokens; the mask comes after them."""

    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 256
    n_query_groups: int | None = None
    intermediate_size: int = 1024
    norm_eps: float = 1e-5
    eos_token_id: int = 2
    pad_token_id: int = 2

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ARCHITECTURES
    MODEL_TYPE: ClassVar[str] = "smdm"
    FIXED: ClassVar[dict[str, Any]] = {
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "shared_attention_norm": False,
        "bias": False,
        "_norm_class": "FusedRMSNorm",
        "_mlp_class": "LLaMAMLP",
        "condense_ratio": 1,
    }

    def __post_init__(self) -> None:
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head={self.n_head}: rotary embedding pairs dimensions")
        if self.n_head % (self.n_query_groups or self.n_head):
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_query_groups={self.n_query_groups}")

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Self:
        """Read a config.json in lit-gpt's words; layouts that this code does not compute are refused.

        Raises:
            CheckpointError: a field has a value that is not supported, or makes no network.
        """
        check_mask(config, cls.MODEL_TYPE, config.get("vocab_size", cls.vocab_size))
        return super().from_published(config)

    def shape(self) -> Shape:
        return Shape(
            width=self.n_embd,
            num_layers=self.n_layer,
            num_heads=self.n_head,
            num_kv_heads=self.n_query_groups or self.n_head,
            head_dim=self.n_embd // self.n_head,
            mlp_width=self.intermediate_size,
            vocab_size=self.vocab_size + 1,
            num_embeddings=self.vocab_size + 1,
            max_length=self.block_size,
            norm_eps=self.norm_eps,
            rope_theta=10000.0,
        )


class GroupedBlock(Block):
    """A layer whose fused projection lies group by group: the queries of a key-value head, its key, its value."""

    def project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        queries = self.shape.num_heads // self.shape.num_kv_heads
        groups = self.heads(self.names.qkv, normed).unflatten(1, (self.shape.num_kv_heads, queries + 2))
        query, key, value = (part.flatten(1, 2) for part in groups.split([queries, 1, 1], dim=2))
        return query if rows is None else query[rows], key, value


class SMDM(Decoder):
    """The network behind `rlhub.load_model` for SMDM checkpoints."""

    def __init__(self, config: Config) -> None:
        profile = Profile(
            mask_id=config.vocab_size,
            eos_id=config.eos_token_id,
            stop_ids=(config.eos_token_id,),
            pad_id=config.pad_token_id,
            lora_targets=r".*\.h\.\d+\.(attn\.attn|attn\.proj|mlp\.swiglu\.w[123])",
        )
        super().__init__(config, profile, NAMES)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def make_block(self, mlp: nn.Module | None) -> nn.Module:
        return GroupedBlock(self.shape, self.names, mlp)

    def head(self, hidden: Tensor, target_rows: Tensor | None = None) -> Tensor:
        """Logits [M, V], `NEVER` for the mask; see `rlhub.models`."""
        return F.pad(super().head(hidden, target_rows), (0, 1), value=NEVER)


build = SMDM
