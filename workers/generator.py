"""The generator: a policy replica with its sampler; turns requests into rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlhub.config import SamplerConfig
from rlhub.lora import training_state
from rlhub.model_files import load_network
from rlhub.noise import Noise
from rlhub.types import Receipt, Request, Rollout
from workers.sync import load_buckets, receipt_of
from workers.transports.collective import GroupMember, receive_state


class StaleWeights(RuntimeError):
    """A worker was asked for a version that it does not hold, as after its restart."""


class Generator(GroupMember):
    """One generator.

    Args:
        model_path: model folder; restarting rebuilds from it, after which the current weights must be received again.
        engine: torch or vllm, a module of `workers.engines`.
    """

    def __init__(
        self,
        model_path: str,
        run_seed: int,
        *,
        engine: str = "torch",
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        threads: int | None = None,
        max_rows: int = 512,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.noise = Noise(run_seed)
        self.network = load_network(Path(model_path), getattr(torch, dtype), device, merge_adapter=False)
        self.network.attention = attention
        self.engine = importlib.import_module(f"workers.engines.{engine}_engine").Engine(self.network, device, max_rows)
        self.version = -1

    def generate(self, requests: Sequence[Request], settings: SamplerConfig, version: int) -> list[Rollout]:
        """One rollout per request under weights `version`.

        Raises:
            StaleWeights: other weights are held.
        """
        if version != self.version:
            raise StaleWeights(f"generator holds version {self.version}, asked for {version}")
        return self.engine.generate(requests, settings, self.noise, version)

    def receive(self, version: int, bucket_bytes: int, *buckets: np.ndarray) -> Receipt:
        """Adopt published weights and return the receipt for what is held now."""
        load_buckets(training_state(self.network), buckets, bucket_bytes)
        return self._adopt(version, bucket_bytes)

    def receive_broadcast(self, version: int, bucket_bytes: int) -> Receipt:
        """Adopt the weights that the learner broadcasts to the weight group."""
        receive_state(self.member, training_state(self.network), bucket_bytes)
        return self._adopt(version, bucket_bytes)

    def _adopt(self, version: int, bucket_bytes: int) -> Receipt:
        self.version = version
        self.engine.weights_changed()
        return receipt_of(self.network, version, bucket_bytes)
