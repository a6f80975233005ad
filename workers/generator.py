"""The generator: a policy replica with its sampler; turns requests into rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from rlhub.checkpoints.weights import load_network
from rlhub.config.schema import SamplerConfig
from rlhub.networks.lora import training_state
from rlhub.noise import Noise
from rlhub.types import Receipt, Request, Rollout
from workers.step_gate import StepGate
from workers.sync import load_buckets, receipt_of
from workers.weight_group import GroupMember, receive_state


class StaleWeights(RuntimeError):
    """A worker was asked for a version that it does not hold, as after its restart."""


class Generator(GroupMember):
    """One generator.

    One thread generates. Another may receive weights meanwhile: generation pauses at the next step boundary, and the rows at work go on
    under the new weights, so a rollout can span versions (`Rollout.policy_version`); it counts as the oldest of them.

    Args:
        model_path: model folder; restarting rebuilds from it, after which the current weights must be received again.
        engine: torch or vllm, a module of `rlhub.engines`.
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
        self.engine = importlib.import_module(f"rlhub.engines.{engine}_engine").Engine(self.network, device, max_rows)
        self.version: int | None = -1  # None while the weights are of two versions
        self.gate = StepGate()

    def generate(self, requests: Sequence[Request], settings: SamplerConfig, version: int) -> list[Rollout]:
        """One rollout per request under weights `version` or newer ones.

        Raises:
            StaleWeights: older weights are held, or new ones failed to arrive, possibly while this was at work.
        """
        with self.gate.loop():
            self._check_whole()
            if self.version is None or self.version < version:
                raise StaleWeights(f"generator holds version {self.version}, asked for {version}")
            rollouts: list[Rollout] = self.engine.generate(requests, settings, self.noise, self.version, self._between_steps)
            return rollouts

    def receive(self, version: int, bucket_bytes: int, *buckets: np.ndarray) -> Receipt:
        """Adopt published weights and return the receipt for what is held now."""
        with self._adopting(version):
            load_buckets(training_state(self.network), buckets, bucket_bytes)
            return receipt_of(self.network, version, bucket_bytes)

    def receive_broadcast(self, version: int, bucket_bytes: int) -> Receipt:
        """Adopt the weights that the learner broadcasts to the weight group."""
        assert self.member is not None, "`join_weights` comes first"
        with self._adopting(version):
            receive_state(self.member, training_state(self.network), bucket_bytes)
            return receipt_of(self.network, version, bucket_bytes)

    @contextmanager
    def _adopting(self, version: int) -> Iterator[None]:
        """Other weights arrive. Where that fails, what is held is of no version, and nothing generates with it."""
        with self.gate.paused():
            if self.engine.device.type == "cuda":
                torch.cuda.synchronize(self.engine.device)  # a step on another stream may still read the old weights
            self.version = None
            yield
            self.engine.weights_changed(version)
            self.version = version

    def _between_steps(self) -> None:
        self.gate.step()
        self._check_whole()

    def _check_whole(self) -> None:
        if self.version is None:
            raise StaleWeights("generator holds a part of new weights, whose transfer failed")
