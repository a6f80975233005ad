"""Views: the noisy rows under which a sequence is scored.

A module here has a frozen dataclass `Config` and

    make(batch: Batch, credit: Credit, config: Config, noise: Stream, update: int) -> Views
    rows_per_sample(config: Config, steps: int) -> int      forwards that one sample costs, for `rlhub plan`

Draw k of sample b takes its noise from the key (uid_b, epoch, update, draw k) and from nothing else, so policy, proximal and
reference see the same masks and the result does not depend on how the batch is cut.
"""

from __future__ import annotations

from typing import Literal

from rlhub.noise import Stream
from rlhub.types import Batch

Levels = Literal["independent", "stratified"]


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
