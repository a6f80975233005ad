"""The executable specification: generation, likelihoods and one ESPO update in plain fp32, one row at a time, as the papers write them.

Slow on purpose. It shares the records, the keys of the noise and a network's weights with the rest of rlhub, and no code: packing,
batching, samplers, caches, views, objectives and LLaDA's layers are written a second time here, without cleverness, for tests to
compare with. Sources are named in `network`, `generation` and `likelihood`.
"""

from rlhub.oracle.generation import generate
from rlhub.oracle.likelihood import (
    LogProb,
    Step,
    completion_log_prob,
    coupled_masks,
    elbo_coupled,
    elbo_exact,
    espo_loss,
    espo_step,
    group_mean,
)
from rlhub.oracle.network import forward, row_logits
from rlhub.oracle.rules import SAMPLERS
from rlhub.oracle.state import draw_token

__all__ = [
    "SAMPLERS",
    "LogProb",
    "Step",
    "completion_log_prob",
    "coupled_masks",
    "draw_token",
    "elbo_coupled",
    "elbo_exact",
    "espo_loss",
    "espo_step",
    "forward",
    "generate",
    "group_mean",
    "row_logits",
]
