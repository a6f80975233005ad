"""LLaDA-MoE: full bidirectional attention with QK norm, and in every layer a mixture of experts (Zhu et al. 2025, arXiv 2509.24389).

Covers checkpoints with `architectures: [LLaDAMoEModelLM]`: LLaDA-MoE-7B-A1B-Base, -Instruct and -Instruct-TD. They say `model_type: llada`
as LLaDA does, and do not name their mask token, `<|mask|>`. The router takes the softmax over all experts and does not renormalise the
weights of the chosen ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from rlhub.errors import CheckpointError
from rlhub.networks.decoder import Decoder, Llama, Names, Shape
from rlhub.networks.experts import Rule, SparseMLP, expert_places, initialize_experts
from rlhub.networks.profile import Profile

ARCHITECTURES = ("LLaDAMoEModelLM",)
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "expert_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 16,
    "mask_token_id": 14,
    "eos_token_id": 13,
    "pad_token_id": 13,
    "rope_theta": 50000,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Config(Llama):
    """The fields of the published config.json that shape the network; `dense_intermediate_size` is kept, no layer is dense."""

    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    expert_intermediate_size: int = 32
    dense_intermediate_size: int = 8192
    num_experts: int = 8
    num_experts_per_tok: int = 2
    mask_token_id: int = 156895
    eos_token_id: int = 156892
    pad_token_id: int = 156892

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ARCHITECTURES
    MODEL_TYPE: ClassVar[str] = "llada"
    FIXED: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "clip_qkv": None,
        "qk_layernorm": True,
        "partial_rotary_factor": 1,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": None,
        "norm_topk_prob": None,
        "routed_scaling_factor": 1,
        "shared_expert_intermediate_size": None,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule()

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Self:
        """Read a published config.json; layouts that this code does not compute are refused.

        Raises:
            CheckpointError: a field has a value that is not supported, or makes no network.
        """
        routed = config.get("moe_layer_freq") or [1]
        if not isinstance(routed, list) or any(layer != 1 for layer in routed):
            raise CheckpointError(f"llada config has moe_layer_freq={routed!r}; only layers of experts, [1, 1, ...], are supported")
        return super().from_published(config)

    def to_published(self) -> dict[str, Any]:
        published = super().to_published() | {"moe_layer_freq": [1] * self.num_hidden_layers}
        del published["intermediate_size"]
        return published

    def rule(self) -> Rule:
        return Rule(self.num_experts, self.num_experts_per_tok)

    def shape(self) -> Shape:
        return Shape(**vars(super().shape()) | {"qk_norm": True})


def places(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where published tensors lie inside others of the network."""
    return expert_places(range(config.num_hidden_layers), config.num_experts)


class LLaDAMoE(Decoder):
    """The network behind `rlhub.load_model` for LLaDA-MoE checkpoints."""

    def __init__(self, config: Config) -> None:
        profile = Profile(
            mask_id=config.mask_token_id,
            eos_id=config.eos_token_id,
            stop_ids=(config.eos_token_id,),
            pad_id=config.pad_token_id,
            lora_targets=r".*\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
        )
        super().__init__(config, profile, Names(), lambda layer: self._mlp(config))

    @staticmethod
    def _mlp(config: Config) -> SparseMLP:
        return SparseMLP(config.hidden_size, config.expert_intermediate_size, config.rule())

    def initialize(self, generator: torch.Generator) -> Self:
        """As in other families; the experts' ways down count as residual outputs."""
        return initialize_experts(super().initialize(generator), self.shape.num_layers)


build = LLaDAMoE
