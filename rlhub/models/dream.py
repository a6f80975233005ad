"""Dream and DiffuCoder: Qwen2.5 turned into masked diffusion, which kept predicting each token from the position before.

Dream 7B (arXiv 2508.15487), Dream-Coder, DreamOn, and DiffuCoder (arXiv 2506.20639). The first token of a row has no position before
it and is predicted from itself, so it should be a visible one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from rlhub.networks.decoder import Decoder, Llama, Names, Shape
from rlhub.networks.profile import Profile

ARCHITECTURES = ("DreamModel",)
END_OF_TURN = 151645  # <|im_end|>
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 24,
    "max_position_embeddings": 256,
    "rope_theta": 1000000.0,
}


@dataclass(frozen=True)
class Config(Llama):
    """The fields of the published config.json that shape the network."""

    ARCHITECTURES = ARCHITECTURES
    MODEL_TYPE = "Dream"
    FIXED: ClassVar[dict[str, Any]] = Llama.FIXED | {"use_mrope": False}

    def shape(self) -> Shape:
        return replace(super().shape(), qkv_bias=True)


def build(config: Config) -> Decoder:
    names = Names()
    profile = Profile(
        mask_id=config.mask_token_id,
        eos_id=config.eos_token_id,
        stop_ids=config.stop_ids(END_OF_TURN),
        pad_id=config.pad_id,
        lora_targets=names.lora_targets,
        logit_shift=1,
        loss_weight="cart",
    )
    return Decoder(config, profile, names)
