"""The scorer: the frozen reference model; evaluates views that it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm.compose import Algorithm, CreditedBatch
from rlhub.algorithm.scoring import token_log_probs
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig
from rlhub.networks.lora import training_state
from rlhub.noise import Noise
from rlhub.types import LogLikelihood, Receipt, Views
from workers.sync import load_buckets, receipt_of


class Scorer:
    """One scorer of `model_path`, or of what it received since."""

    def __init__(
        self,
        model_path: str,
        micro_batch_tokens: int,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.device, self.micro_batch_tokens = torch.device(device), micro_batch_tokens
        self.network = load_network(Path(model_path), getattr(torch, dtype), device, merge_adapter=False)
        self.network.attention = attention

    def load(self, model_path: str) -> None:
        """Take the weights of a model folder as the reference."""
        dtype, attention = next(self.network.parameters()).dtype, self.network.attention
        self.network = load_network(Path(model_path), dtype, self.device, merge_adapter=False)
        self.network.attention = attention

    def save(self, folder: str) -> None:
        """Write the reference as a model folder."""
        save_network(self.network, Path(folder))

    def score(self, views: list[Views], first: int = 0, stride: int = 1) -> dict[int, Tensor]:
        """Log-probs `[M]` of `views[first::stride]` by index."""
        indices = range(first, len(views), stride)
        return {index: token_log_probs(self.network, views[index], self.micro_batch_tokens, self.device) for index in indices}

    def estimate(
        self, algorithm: AlgorithmConfig, run_seed: int, credited: CreditedBatch, first: int = 0, stride: int = 1
    ) -> dict[int, LogLikelihood]:
        """The reference's estimates for a batch through the noise that the algorithm gives it, by index of the sets of views.

        The views are made here, from the same keys as the learner's.
        """
        parts = Algorithm.compose(algorithm)
        credit, noise, batch = credited.credit, Noise(run_seed), credited.batch
        found = {}
        for index in range(first, parts.num_views, stride):
            views = parts.make_views(batch, credit, noise, index, self.network.profile, parts.reference_noise)
            log_prob = token_log_probs(self.network, views, self.micro_batch_tokens, self.device)
            found[index] = parts.estimate(log_prob, views, credit)
        return found

    def receive(self, version: int, bucket_bytes: int, *buckets: np.ndarray) -> Receipt:
        """Adopt published weights as the new reference."""
        load_buckets(training_state(self.network), buckets, bucket_bytes)
        return receipt_of(self.network, version, bucket_bytes)
