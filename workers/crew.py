"""The crew of a run: one group for each role, whose methods are calls of the workers' own.

    crew.learners.step(batch)          every learner runs `Learner.step`; the answer of rank 0
    crew.scorers.score(views)          each scorer takes its share of the views
    crew.generators.generate(...)      requests are shared out; a generator that dies is replaced
    crew.graders.grade(batches)        so are batches of completions to be graded

What several workers receive is put into the runtime once (`Runtime.put`) and handed on as a future: `Sent[T]` is a value or its future.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from rewards import Item
from rlhub.algorithm.compose import CreditedBatch
from rlhub.config.schema import AlgorithmConfig, OptimizerConfig, SamplerConfig
from rlhub.errors import SyncError, WorkerLost
from rlhub.types import LogLikelihood, Receipt, Request, RewardResult, Rollout, Views
from workers.generator import Generator
from workers.learner import Learner, Reference
from workers.reward import RewardWorker
from workers.runtimes.runtime import Future, Handle, Runtime, T, Ts, value_of
from workers.scorer import Scorer
from workers.supervisor import Pool, Work
from workers.transports import Receiver, WeightTransport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Sent: TypeAlias = T | Future[T]


@dataclass
class LearnerGroup:
    """All ranks of the learners. Every call goes to each of them, since what they do is collective, and gives the answer of rank 0.

    Raises:
        WorkerLost: of each call, when a learner died.
    """

    runtime: Runtime
    handles: list[Handle[Learner]]

    def begin(self, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, total_updates: int, model_path: str | None = None) -> None:
        """See `Learner.begin`."""
        self._all(Learner.begin, algorithm, optimizer, total_updates, model_path)

    def make_views(self, batch: Sent[CreditedBatch]) -> Future[list[Views]]:
        """The views of every inner update, made by rank 0; a future, for those who need them."""
        return self.runtime.submit(self.handles[0], Learner.make_views, value_of(batch))

    def step(
        self, batch: Sent[CreditedBatch], views: Sent[list[Views]] | None = None, reference: Sequence[Sent[Reference]] = ()
    ) -> dict[str, float]:
        """All inner updates on a batch, see `Learner.step`; the metrics of the last."""
        return self.finish_step(self.begin_step(batch, views, reference))

    def begin_step(
        self, batch: Sent[CreditedBatch], views: Sent[list[Views]] | None = None, reference: Sequence[Sent[Reference]] = ()
    ) -> list[Future[dict[str, float]]]:
        """Let the learners step and return at once; for `finish_step`."""
        parts: list[Reference] = [value_of(part) for part in reference]
        return [self.runtime.submit(handle, Learner.step, value_of(batch), value_of(views), *parts) for handle in self.handles]

    def finish_step(self, steps: Sequence[Future[dict[str, float]]]) -> dict[str, float]:
        """The metrics of a step that was begun."""
        return gather(self.runtime, steps)[0]

    def estimate(self, algorithm: AlgorithmConfig, batch: Sent[CreditedBatch], base: bool = False) -> LogLikelihood:
        """The policy's estimate, see `Learner.estimate`."""
        return self._all(Learner.estimate, algorithm, value_of(batch), base)

    def replay_check(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """See `Learner.replay_check`."""
        return self._all(Learner.replay_check, rollouts)

    def receipt(self, version: int, bucket_bytes: int) -> Receipt:
        """What a receiver of the weights must hold."""
        return self._all(Learner.receipt, version, bucket_bytes)

    def save(self, folder: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the optimizer state and the weights, see `Learner.save`."""
        self._all(Learner.save, folder, tokenizer)

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote."""
        self._all(Learner.load, folder)

    def leave(self) -> None:
        """Let the learners leave their process group, without waiting for it."""
        for handle in self.handles:
            self.runtime.submit(handle, Learner.leave)

    def _all(self, method: Callable[[Learner, *Ts], T], *args: *Ts) -> T:
        return gather(self.runtime, [self.runtime.submit(handle, method, *args) for handle in self.handles])[0]


@dataclass
class ScorerGroup:
    """The scorers, which all hold the same reference. The answers of `score` and `estimate` are parts of one: there, but still futures,
    so that learners take them from the scorers."""

    runtime: Runtime
    handles: list[Handle[Scorer]]

    def load(self, model_path: str) -> None:
        """Take the weights of a model folder as the reference."""
        gather(self.runtime, [self.runtime.submit(handle, Scorer.load, model_path) for handle in self.handles])

    def save(self, folder: str) -> None:
        """Write the reference as a model folder."""
        self.runtime.get(self.runtime.submit(self.handles[0], Scorer.save, folder))

    def score(self, views: Sent[list[Views]]) -> list[Future[dict[int, Tensor]]]:
        """Log-probs under every set of views, shared out over the scorers."""
        count = len(self.handles)
        return self._done([self.runtime.submit(handle, Scorer.score, value_of(views), index, count) for index, handle in self._numbered()])

    def estimate(self, algorithm: AlgorithmConfig, run_seed: int, batch: Sent[CreditedBatch]) -> list[Future[dict[int, LogLikelihood]]]:
        """Estimates through views of the reference's own, whose sets are shared out over the scorers."""
        sent, count = value_of(batch), len(self.handles)
        return self._done(
            [self.runtime.submit(handle, Scorer.estimate, algorithm, run_seed, sent, index, count) for index, handle in self._numbered()]
        )

    def begin_estimate(
        self, worker: int, algorithm: AlgorithmConfig, run_seed: int, batch: CreditedBatch
    ) -> Future[dict[int, LogLikelihood]]:
        """Let one scorer, counted round, estimate all of a batch."""
        return self.runtime.submit(self.handles[worker % len(self.handles)], Scorer.estimate, algorithm, run_seed, batch, 0, 1)

    def collect(self, estimates: Sequence[Future[T]]) -> list[T]:
        """The values of estimates that were begun."""
        return gather(self.runtime, estimates)

    def _numbered(self) -> list[tuple[int, Handle[Scorer]]]:
        return list(enumerate(self.handles))

    def _done(self, parts: list[Future[T]]) -> list[Future[T]]:
        gather(self.runtime, parts)
        return parts


class GeneratorPool(Pool[Generator]):
    """The generators; a pool, since any of them can do another's work."""

    def generate(self, requests: Sequence[Request], settings: SamplerConfig, version: int) -> list[Rollout]:
        """Rollouts of all requests under weights `version` or newer ones, in the order of the requests."""
        return self.finish_generate(self.begin_generate(requests, settings, version))

    def begin_generate(self, requests: Sequence[Request], settings: SamplerConfig, version: int) -> Work[list[Rollout]]:
        """Share the requests out and return at once; for `finish_generate`."""
        share = -(-len(requests) // len(self.handles))
        pieces = [(requests[start : start + share], settings, version) for start in range(0, len(requests), share)]
        return self.begin(Generator.generate, pieces)

    def finish_generate(self, work: Work[list[Rollout]]) -> list[Rollout]:
        """Wait for rollouts, in the order of their requests."""
        return [rollout for part in self.collect(work) for rollout in part]


class GraderPool(Pool[RewardWorker]):
    """The reward workers."""

    def grade(self, batches: Sequence[Sequence[Item]]) -> list[list[RewardResult] | WorkerLost]:
        """The grades of each batch, of its first items only where its worker ran out of time; of a batch whose workers kept dying, why."""
        return self.map(_grade, [(batch,) for batch in batches], give_up=lambda _, error: error)


_grade: Callable[[RewardWorker, Sequence[Item]], list[RewardResult] | WorkerLost] = RewardWorker.grade


@dataclass
class Crew:
    """All workers of a run, and the weights that travel between them."""

    runtime: Runtime
    learners: LearnerGroup
    scorers: ScorerGroup
    generators: GeneratorPool
    graders: GraderPool
    transport: WeightTransport
    bucket_bytes: int
    sync_timeout: float | None = None  # seconds
    version: int = -1
    last_receipt: Receipt | None = field(default=None)

    def __post_init__(self) -> None:
        self.generators.refresh = self.refresh

    def publish(self, version: int, concurrent: bool = False) -> Receipt:
        """Give every generator the learners' weights as `version` and compare receipts.

        A generator that is being rebuilt or does not answer in time is left out; it is brought up to date when it is readmitted.

        Args:
            concurrent: generators adopt them between two steps of the batch that they are at, instead of after it.

        Raises:
            SyncError: a generator holds something else than the learners.
        """
        self.version = version
        receipts = self.transport.push(self.generators.handles, version, concurrent)
        self.last_receipt = self.learners.receipt(version, self.bucket_bytes)
        handles = {handle.name: handle for handle in self.generators.handles}
        for name, future in receipts.items():
            if not self.runtime.wait([future], timeout=self.sync_timeout):
                self.runtime.restart(handles[name])
                continue
            try:
                self._check(name, self.runtime.get(future))
            except WorkerLost:
                continue
        return self.last_receipt

    def refresh(self, receiver: Handle[Receiver]) -> None:
        """Bring one generator or scorer up to date."""
        self._check(receiver.name, self.runtime.get(self.transport.refresh(receiver, self.version)))

    def copy_reference(self) -> None:
        """Give every scorer the weights that were published last."""
        for scorer in self.scorers.handles:
            self.refresh(scorer)

    def close(self) -> None:
        self.transport.close()
        self.learners.leave()
        self.runtime.close()

    def _check(self, name: str, received: Receipt) -> None:
        if self.last_receipt is None:
            raise SyncError(f"{name} holds weights although none were published; begin a phase first")
        difference = self.last_receipt.mismatch(received)
        if difference is not None:
            raise SyncError(f"{name} holds other weights than the learners: {difference}")


def gather(runtime: Runtime, futures: Sequence[Future[T]]) -> list[T]:
    """All values. A failure is raised soon, since the other members of a collective may wait for the one that failed.

    Raises:
        WorkerLost: where a worker died, also when the error of another one that needed it arrives first.
    """
    waiting = list(futures)
    values: dict[int, T] = {}
    errors: list[Exception] = []
    while waiting and not any(isinstance(error, WorkerLost) for error in errors):
        ready = runtime.wait(waiting, timeout=2.0 if errors else None)
        if not ready:
            break
        for future in ready:
            waiting.remove(future)
            try:
                values[id(future)] = runtime.get(future)
            except Exception as error:
                errors.append(error)
    if errors:
        raise next((error for error in errors if isinstance(error, WorkerLost)), errors[0])
    return [values[id(future)] for future in futures]
