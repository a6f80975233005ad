"""An objective of your own: the clipped ratio of GRPO with a band that is wider above 1 than below, as DAPO clips (arXiv 2503.14476).

    rlhub plan examples/my_objective.yaml           # checks it
    rlhub train examples/my_objective.yaml

The recipe names this file by its dotted path from the folder in which the command runs. A file in `rlhub/objectives/` is written the
same way and named `my_objective`.
"""

from dataclasses import dataclass

from torch import Tensor

from rlhub.objectives import clipped_surrogate, valid_mean
from rlhub.types import Credit, Scores

NEEDS = ("proximal",)  # the policy as it was when the batch began


@dataclass(frozen=True)
class Config:
    """The options that a recipe may set, with their defaults."""

    low: float = 0.2  # the ratio acts down to 1 - low
    high: float = 0.28  # and up to 1 + high

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(f"low must be positive and at most high, got {self.low} and {self.high}")


def loss(scores: Scores, credit: Credit, config: Config) -> tuple[Tensor, dict[str, float]]:
    """The scalar to minimise over the global batch, and metrics of your own."""
    log_ratio = (scores.policy.value - scores.proximal.value.detach()) / scores.policy.scored_length
    above = (log_ratio.detach().exp() > 1 + config.high).double().mean()
    value = -valid_mean(clipped_surrogate(log_ratio, credit.advantages, config.low, config.high), credit)
    return value, {"above_band": above.item()}
