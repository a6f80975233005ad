"""iLLaDA: LLaDA's successor, with grouped queries, a tied head and answers of variable length (Nie et al. 2026, arXiv 2606.25331)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rlhub.networks.decoder import Decoder, Llama, Names
from rlhub.networks.profile import Profile

ARCHITECTURES = ("ILLaDAForCausalLM",)
UNUSED = r"lm_head\.weight"  # a copy of the embedding, where a checkpoint holds both
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": 24,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Config(Llama):
    """The fields of the published config.json that shape the network; the mask token, which it does not name, is `<[MASK]>`."""

    tie_word_embeddings: bool = True
    mask_token_id: int = 5

    ARCHITECTURES = ARCHITECTURES
    MODEL_TYPE = "illada"
    FIXED: ClassVar[dict[str, Any]] = Llama.FIXED | {"attention_bias": False, "mlp_bias": False, "layer_norm_eps": None}


def build(config: Config) -> Decoder:
    names = Names()
    profile = Profile(
        mask_id=config.mask_token_id,
        eos_id=config.eos_token_id,
        stop_ids=config.stop_ids(),
        pad_id=config.pad_id,
        lora_targets=names.lora_targets,
        eos_padding="first",
    )
    return Decoder(config, profile, names)
