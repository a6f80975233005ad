"""Views: the noisy rows under which a sequence is scored.

A module here has a frozen dataclass `Config` and

    make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int, profile: Profile) -> Views
    rows_per_sample(config: Config, steps: int) -> int      forwards that one sample costs, for `rlhub plan`

and may state

    EXACT_ON_BLOCKS: bool       under a block-causal model its rows make the likelihood that they make under full attention. Default: False,
                                a proxy there
    REPLAYS: bool               it replays the denoising steps of a rollout, which preference data has not. Default: False
    merges_steps(config) -> bool    whether rows stand for several denoising steps, so that their log-probs are not the rollout's own.
                                Default: no
    LOG_LIKELIHOOD: str         what `rlhub.log_likelihood` gets from it: `draws`, unbiased ones of the ELBO (it then has an option of
                                that name), or `value`, one without error. Default: nothing, it is refused there
    FORM: str                   the views around which `rlhub bench variance` measures. Default: elbo

Draw k of sample b takes its noise from the key (uid_b, epoch, update, draw k) and from nothing else, so policy, proximal and
reference see the same masks and the result does not depend on how the batch is cut.

A budget of n = n_t n_y draws may put n_y = `masks_per_level` masks on each of n_t noise levels; its variance is V_t / n_t + V_y / n, so
n_y = 1 is best (VRPO, arXiv 2505.19223, Lemma 5 and Proposition 1).

The profile names the mask, and the blocks of a block-causal model, which generates block after block. `elbo`, `coupled`, `supervised` and
`all_masks` noise each block on its own and show it the blocks before clean: the sum of the blocks' ELBOs given their prefix. `trajectory`
and `prefix` replay states. The other views mask the whole completion at once, which is a proxy there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from rlhub.networks.profile import Profile
from rlhub.noise import Quantity, Stream
from rlhub.types import Batch

CONTRACT = ("Config", "make(batch, credit, config, noise, update, profile)", "rows_per_sample(config, steps)")


def check_draws(draws: int, masks_per_level: int = 1) -> None:
    """Refuses a budget that cannot be split into n_t = draws / masks_per_level noise levels with n_y = masks_per_level masks each.

    Raises:
        ValueError: a number is below 1, or `draws` is no multiple of `masks_per_level`.
    """
    if draws < 1 or masks_per_level < 1:
        raise ValueError(f"draws and masks_per_level must be at least 1, got draws={draws} and masks_per_level={masks_per_level}")
    if draws % masks_per_level:
        raise ValueError(f"draws must be a multiple of masks_per_level={masks_per_level}, got {draws}")


def mask_level(noise: Stream, batch: Batch, sample: int, draw: int, num_draws: int, update: int, levels: str, block: int = 0) -> float:
    """A noise level, uniform on (0, 1), of a block of the model.

    `stratified` spreads the draws of one sample over equal strata by one shared offset (systematic sampling): each draw keeps the
    uniform law, which a per-sample estimate needs, and the mean over draws has lower variance.
    """
    key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "block": block}
    if levels == "stratified":
        return float((noise.uniform(1, **key, draw=0, quantity=Quantity.LEVEL)[0] + draw / num_draws) % 1.0)
    if levels != "independent":
        raise ValueError(f"levels must be independent or stratified, got {levels!r}")
    return float(noise.uniform(1, **key, draw=draw, quantity=Quantity.LEVEL)[0])


def count_of(level: float, size: int, low: int = 1) -> int:
    """The mask count l in {low, ..., size} of a level, uniform when the level is.

    The level is cut down to a count, since rounding half to even would never draw some counts.
    """
    choices = size - low + 1
    return low + min(int(level * choices), choices - 1)


def model_blocks(batch: Batch, sample: int, profile: Profile) -> list[slice]:
    """The parts of a sample's scored scored_length that lie in each block of the model; one part for full attention."""
    scored_length, size = int(batch.scored_length[sample]), profile.block_length
    inner = range(size - len(batch.prompts[sample]) % size, scored_length, size) if size else ()
    return [slice(*edges) for edges in itertools.pairwise([0, *inner, scored_length])]


@dataclass(frozen=True)
class Masks:
    """One draw: of each block of the model a uniform subset, whose size has uniform law.

    Attributes:
        masked: bool [scored_length].
        count: int64 [scored_length], masked tokens of each position's block.
        size: int64 [scored_length], tokens of each position's block.
    """

    masked: np.ndarray
    count: np.ndarray
    size: np.ndarray


def draw_masks(
    noise: Stream,
    batch: Batch,
    sample: int,
    draw: int,
    num_draws: int,
    update: int,
    profile: Profile,
    levels: str,
    low: int,
    masks_per_level: int = 1,
) -> Masks:
    """l ~ U{low..L_b} masks among the L_b tokens of each block b; `masks_per_level` neighbouring draws share the level."""
    scored_length = int(batch.scored_length[sample])
    masked, count, size = (
        np.zeros(scored_length, dtype=bool),
        np.zeros(scored_length, dtype=np.int64),
        np.zeros(scored_length, dtype=np.int64),
    )
    key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update, "draw": draw}
    for number, block in enumerate(model_blocks(batch, sample, profile)):
        tokens = block.stop - block.start
        level = mask_level(noise, batch, sample, draw // masks_per_level, num_draws // masks_per_level, update, levels, number)
        size[block], count[block] = tokens, count_of(level, tokens, low)
        masked[block] = noise.subset(tokens, int(count[block.start]), **key, block=number)
    return Masks(masked, count, size)
