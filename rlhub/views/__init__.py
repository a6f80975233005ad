"""Views: the noisy rows under which a sequence is scored.

A module here has a frozen dataclass `Config` and

    make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int) -> Views
    rows_per_sample(config: Config, steps: int) -> int      forwards that one sample costs, for `rlhub plan`

Draw k of sample b takes its noise from the key (uid_b, epoch, update, draw k) and from nothing else, so policy, proximal and
reference see the same masks and the result does not depend on how the batch is cut.

A budget of n = n_t n_y draws may put n_y = `masks_per_level` masks on each of n_t noise levels; its variance is V_t / n_t + V_y / n, so
n_y = 1 is best (VRPO, arXiv 2505.19223, Lemma 5 and Proposition 1).
"""

from __future__ import annotations

from typing import Literal

from rlhub.noise import Stream
from rlhub.types import Batch

Levels = Literal["independent", "stratified"]


def check_draws(draws: int, masks_per_level: int = 1) -> None:
    """Refuses a budget that cannot be split into n_t = draws / masks_per_level noise levels with n_y = masks_per_level masks each.

    Raises:
        ValueError: a number is below 1, or `draws` is no multiple of `masks_per_level`.
    """
    if draws < 1 or masks_per_level < 1:
        raise ValueError(f"draws and masks_per_level must be at least 1, got draws={draws} and masks_per_level={masks_per_level}")
    if draws % masks_per_level:
        raise ValueError(f"draws must be a multiple of masks_per_level={masks_per_level}, got {draws}")


def mask_level(noise: Stream, batch: Batch, sample: int, draw: int, num_draws: int, update: int, levels: str) -> float:
    """A noise level, uniform on (0, 1).

    `stratified` spreads the draws of one sample over equal strata by one shared offset (systematic sampling): each draw keeps the
    uniform law, which a per-sample estimate needs, and the mean over draws has lower variance.
    """
    key = {"uid": int(batch.uid[sample]), "epoch": batch.epoch, "update": update}
    if levels == "stratified":
        return float((noise.uniform(1, **key, draw=0, position=1)[0] + draw / num_draws) % 1.0)
    if levels != "independent":
        raise ValueError(f"levels must be independent or stratified, got {levels!r}")
    return float(noise.uniform(1, **key, draw=draw, position=1)[0])


def mask_count(noise: Stream, batch: Batch, sample: int, draw: int, num_draws: int, update: int, levels: str, low: int) -> int:
    """A mask count l with uniform law on {low, ..., L}; see `mask_level`.

    The level is cut down to a count, since rounding half to even would never draw some counts.
    """
    choices = int(batch.span[sample]) - low + 1
    level = mask_level(noise, batch, sample, draw, num_draws, update, levels)
    return low + min(int(level * choices), choices - 1)
