"""LLaDA2.0 and 2.1: block-causal attention and grouped sigmoid routing (Bie et al. 2025, arXiv 2512.15745; 2.1: arXiv 2602.08676).

Covers checkpoints with `architectures: [LLaDA2MoeModelLM]`: LLaDA2.0-mini and -flash with their -CAP variants, LLaDA2.1-mini and -flash.
Attention is causal over blocks of 32 positions, counted from the prompt's first token, and bidirectional within them; the first half of
each head's dimensions turns with the position; the first layers are dense; in the others every token goes through a shared expert and
through eight of 256, chosen within the four best of eight groups by biased scores and weighed by the unbiased ones. The bias is a buffer:
it is saved, loaded and synchronised with the weights, and no gradient reaches it.

The config.json of 2.0 and 2.1 are the same. 2.1 can also replace tokens that are already there: write `"editing": true` into its
config.json to have that in the profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from rlhub.networks.decoder import Decoder, Llama, Names, Shape
from rlhub.networks.experts import Rule, SparseMLP, expert_places, initialize_experts
from rlhub.networks.profile import Profile

ARCHITECTURES = ("LLaDA2MoeModelLM",)
NAMES = Names(
    embedding="model.word_embeddings",
    qkv="attention.query_key_value",
    query_norm="attention.query_layernorm",
    key_norm="attention.key_layernorm",
    output="attention.dense",
)
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "vocab_size": 16,
    "mask_token_id": 14,
    "eos_token_id": 13,
    "pad_token_id": 13,
    "block_length": 4,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Config(Llama):
    """The fields of the published config.json that shape the network, and three that it lacks: mask token, block length, editing."""

    rope_theta: float = 600000.0
    num_key_value_heads: int = 4
    head_dim: int = 16
    moe_intermediate_size: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_shared_experts: int = 1
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    first_k_dense_replace: int = 1
    mask_token_id: int = 156895
    eos_token_id: int = 156892
    pad_token_id: int = 156892
    block_length: int = 32
    editing: bool = False

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ARCHITECTURES
    MODEL_TYPE: ClassVar[str] = "llada2_moe"
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule()
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor} turns {self.rotary_dim} of {self.head_dim} dimensions")
        if self.block_length < 1:
            raise ValueError(f"block_length={self.block_length} must be at least 1")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def to_published(self) -> dict[str, Any]:
        return super().to_published() | {"rotary_dim": self.rotary_dim}

    def rule(self) -> Rule:
        return Rule(
            self.num_experts,
            self.num_experts_per_tok,
            score="sigmoid",
            num_groups=self.n_group,
            kept_groups=self.topk_group,
            normalize=True,
            scale=self.routed_scaling_factor,
        )

    def shape(self) -> Shape:
        return Shape(**vars(super().shape()) | {"qk_norm": True, "rotary_dim": self.rotary_dim})


def places(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where published tensors lie inside others of the network."""
    return expert_places(range(config.first_k_dense_replace, config.num_hidden_layers), config.num_experts)


class LLaDA2(Decoder):
    """The network behind `rlhub.load_model` for LLaDA2 checkpoints."""

    def __init__(self, config: Config) -> None:
        profile = Profile(
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            stop_ids=(config.eos_token_id,),
            pad_id=config.pad_token_id,
            attention="block_causal",
            block_length=config.block_length,
            loss_weight="plain",
            eos_padding="first",
            editing=config.editing,
            lora_targets=r".*\.layers\.\d+\.attention\.(query_key_value|dense)",
        )
        super().__init__(config, profile, NAMES, lambda layer: self._mlp(config, layer))

    @staticmethod
    def _mlp(config: Config, layer: int) -> SparseMLP | None:
        if layer < config.first_k_dense_replace:
            return None
        inner = config.moe_intermediate_size
        return SparseMLP(config.hidden_size, inner, config.rule(), bias=True, shared_inner=inner * config.num_shared_experts)

    def initialize(self, generator: torch.Generator) -> Self:
        """As in other families; the experts' ways down count as residual outputs, and the selection bias is 0."""
        return initialize_experts(super().initialize(generator), self.shape.num_layers)


build = LLaDA2
