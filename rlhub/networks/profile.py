"""What a family declares of itself, for everything that must not know families by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Profile:
    """What sets a family apart for samplers, likelihoods, losses and adapters.

    Attributes:
        stop_ids: tokens that end an answer: EOS and ends of turns.
        logit_shift: 1 where the network's output at position p - 1 predicts token p; the family has applied it.
        block_length: of block-causal families, whose blocks count from position 0 of the row.
        corruption: absorbing (tokens become the mask) or uniform (tokens become other tokens).
        loss_weight: of its pre-training and fine-tuning: inverse_t (LLaDA Eq. 3), cart (Dream's context-adaptive rescheduling), plain.
        eos_padding: which EOS of padded answers are trained: loss (all), first (one), none.
        editing: it may replace tokens that are already there (LLaDA2.1).
        lora_targets: regular expression of the module names that adapters attach to.
        time_conditioned: the network takes the noise level as an input.
    """

    mask_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    lora_targets: str
    logit_shift: Literal[0, 1] = 0
    attention: Literal["full", "block_causal"] = "full"
    block_length: int | None = None
    corruption: Literal["absorbing", "uniform"] = "absorbing"
    loss_weight: Literal["inverse_t", "cart", "plain"] = "inverse_t"
    eos_padding: Literal["loss", "first", "none"] = "loss"
    editing: bool = False
    time_conditioned: bool = False
