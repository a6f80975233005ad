"""What work belongs to: the phases of training, and the two kinds of generation beside it."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """A phase of training as `run.phases`, metrics and checkpoints name it, or a use of generators outside of training.

    Example:
        >>> Phase("online") is Phase.ONLINE, Phase.ONLINE.number, f"{Phase.ONLINE}"
        (True, 1, 'online')
    """

    SFT = "sft"
    ONLINE = "online"
    EVAL = "eval"  # held-out problems and pairs
    SAMPLE = "sample"  # completions for `rlhub pairs`
    PAIRS = "pairs"

    @property
    def number(self) -> int:
        """The phase field of uids, which must never change: it keys noise."""
        return _NUMBERS[self]


_NUMBERS = {Phase.SFT: 0, Phase.ONLINE: 1, Phase.EVAL: 2, Phase.SAMPLE: 3, Phase.PAIRS: 4}
TRAINING = (Phase.SFT, Phase.ONLINE, Phase.PAIRS)
