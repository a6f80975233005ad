"""SDAR and TraDo: Qwen3 turned into block diffusion, blocks from left to right and masked diffusion within (arXiv 2510.06303, 2509.06949).

A token sees its own block and those before it. Blocks count from the first token of the row, so the end of a prompt may share its block
with the beginning of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rlhub.networks.decoder import Decoder, Llama, Names, Shape
from rlhub.networks.profile import Profile

ARCHITECTURES = ("SDARForCausalLM",)
END_OF_TURN = 151645  # <|im_end|>
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 24,
    "max_position_embeddings": 256,
    "rope_theta": 1000000.0,
    "block_size": 4,
}


@dataclass(frozen=True)
class Config(Llama):
    """The fields of the published config.json that shape the network."""

    block_size: int = 4

    ARCHITECTURES = ARCHITECTURES
    MODEL_TYPE = "sdar"
    FIXED: ClassVar[dict[str, Any]] = Llama.FIXED | {"attention_bias": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}; a block has at least one token")

    def shape(self) -> Shape:
        return replace(super().shape(), qk_norm=True)


def build(config: Config) -> Decoder:
    names = Names()
    profile = Profile(
        mask_id=config.mask_token_id,
        eos_id=config.eos_token_id,
        stop_ids=config.stop_ids(END_OF_TURN),
        pad_id=config.pad_id,
        lora_targets=names.lora_targets,
        attention="block_causal",
        block_length=config.block_size,
        loss_weight="inverse_t",
        eos_padding="first",
    )
    return Decoder(config, profile, names)
