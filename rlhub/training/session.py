"""One run: its folder, its crew, where it stands, and what is written when."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.answers.text import plain
from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.health import staleness
from rlhub.algorithm.replay import TOLERANCE, choose_rollouts, gap_warning
from rlhub.checkpoints.sealed import checkpoint_name, read_manifest, remove_old_checkpoints, sealed_checkpoints, write_manifest
from rlhub.config.schema import AlgorithmConfig, OptimizerConfig, Recipe
from rlhub.config.tasks import task_kind
from rlhub.errors import UserError
from rlhub.noise import Noise
from rlhub.records.metrics import SpanClock, busy_union, idle_share
from rlhub.records.progress import RunProgress
from rlhub.records.rollout_log import dump_rollouts, rollout_path, token_namer, token_strings
from rlhub.records.trackers import Trackers
from rlhub.tasks import Task
from rlhub.training.documents import evaluate_documents
from rlhub.training.held_out import evaluate
from rlhub.training.pairs import PairData, evaluate_pairs
from rlhub.training.rollouts import Issued
from rlhub.types import Rollout

SAMPLES_SHOWN = 32  # rollouts kept in each dump


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one stops at once."""

    def __init__(self, progress: RunProgress) -> None:
        self.requested, self.progress = False, progress
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.progress.message("stopping after this step with a checkpoint; once more stops at once")


@dataclass
class Session:
    """The state that the loops share. `position` is the last finished (phase, step), from a checkpoint when resumed."""

    recipe: Recipe
    folder: Path
    model_path: Path  # what the first phase started from
    tokenizer: Any
    train_task: Task
    eval_task: Task
    crew: Any
    trackers: Trackers
    progress: RunProgress
    position: tuple[str, int] | None
    stop: StopRequest
    wall_before: float = 0.0  # seconds of earlier attempts
    pairs: PairData | None = None  # preference data, where the recipe has some
    noise: Noise = field(init=False)
    clock: SpanClock = field(default_factory=SpanClock)
    needs_reference: bool = False  # from scorers
    reference_path: Path | None = None  # the model folder of the reference as the phase, or its resumed part, began

    def __post_init__(self) -> None:
        self.noise = Noise(self.recipe.run.seed)
        self.started = self.clock.start
        self.row: dict[str, Any] = {}

    def span(self, name: str) -> AbstractContextManager[None]:
        """Count the time of a `with` block as `time/<name>_s` of this step."""
        return self.clock.span(name)

    def begin(self, phase: str, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, total_updates: int) -> None:
        """Prepare the learners for a phase, and the reference when its objective needs one."""
        resumed = self.position is not None and self.position[0] == phase
        start = self._phase_start(phase)
        self.crew.learn("begin", algorithm, optimizer, total_updates, str(start))
        if resumed:
            self.crew.learn("load", str(self._checkpoint(*self.position)))
        self.needs_reference = Algorithm.compose(algorithm).needs_scorers
        if self.needs_reference:
            followed = self._checkpoint(*self.position) / "reference" if resumed else start
            self.reference_path = followed if followed.exists() else start
            self.crew.set_reference(str(self.reference_path))

    def steps(self, phase: str, total: int, eval_every: int) -> Iterator[int]:
        """The steps still to be made, each evaluated, logged and checkpointed as the recipe says when the loop comes back for the next.

        The policy before the first step is evaluated as step 0. Ctrl-C or SIGTERM finishes the step, saves a checkpoint and ends.
        """
        done = self.position[1] if self.position is not None and self.position[0] == phase else 0
        self.progress.phase(phase, total, done)
        if self.crew.generators.handles:
            self.publish_at(phase, done)
        if done == 0:
            self.clock.reset()
            self._log(phase, 0, self._evaluate(phase))
        for step in range(done + 1, total + 1):
            self.clock.reset()
            self.crew.runtime.take_intervals()
            self.row = {}
            yield step
            due = step % eval_every == 0 or step == total
            if due and phase != "online" and self.crew.generators.handles:
                self.publish_at(phase, step)
            row = self.row | (self._evaluate(phase) if due else {})
            self.position = (phase, step)
            self._log(phase, step, row)
            every = eval_every if phase == "sft" else self.recipe.run.checkpoint_every
            if step == total or step % every == 0 or self.stop.requested:
                self._save(phase, step)
            if self.stop.requested:
                raise KeyboardInterrupt

    def publish(self, step: int) -> None:
        """Send the learners' weights to the generators after an online step."""
        self.publish_at("online", step)
        self.follow_policy("online", step)

    def follow_policy(self, phase: str, step: int) -> None:
        """Give the scorers the policy's weights where the recipe says `sync_every:N` and N steps are over."""
        name, _, every = self.recipe.algorithm.reference.partition(":")
        if name == "sync_every" and self.needs_reference and step % int(every) == 0:
            if phase != "online":
                self.publish_at(phase, step)
            self.crew.copy_reference()

    def publish_at(self, phase: str, step: int) -> None:
        """Versions count the steps of all phases, so they grow through a run."""
        offset = self.recipe.sft.steps if phase != "sft" and "sft" in self.recipe.run.phases else 0
        receipt = self.crew.publish(offset + step, self.recipe.weights.in_flight)
        self.row |= {"sync/receipt_ok": 1.0, "sync/version": receipt.version, "system/sync_bytes": receipt.num_bytes}

    def finish_step(self, metrics: dict[str, Any], num_samples: int) -> None:
        """Close the clocks of a step: time per phase, idle share per role and what the controller itself cost.

        Raises:
            UserError: the gradient is not finite, after which the weights are of no use.
        """
        if not math.isfinite(metrics.get("grad_norm", 0.0)):
            raise UserError(
                f"the gradient norm is {metrics['grad_norm']} after this step, so the weights are lost; the last checkpoint is whole: "
                "start again under another run.name with a lower learning rate, or from that checkpoint with model.path"
            )
        window = self.clock.window()
        intervals = self.crew.runtime.take_intervals()
        everything = [interval for part in intervals.values() for interval in part]
        seconds = window[1] - window[0]
        times = self.clock.metrics() | {"time/overhead_s": seconds - busy_union(everything, window)}
        roles = sorted({name.rsplit("-", 1)[0] for name in intervals})
        idle = {
            f"system/idle_share/{role}": idle_share([i for name in intervals if name.startswith(role) for i in intervals[name]], window)
            for role in roles
        }
        self.row |= metrics | times | idle | {"throughput/samples_per_s": num_samples / seconds, "num_samples": num_samples}
        lost = self.crew.generators.num_lost + self.crew.graders.num_lost
        if lost:
            self.row["system/workers_lost"] = lost

    def check_replay(self, step: int, rollouts: list[Rollout]) -> dict[str, float]:
        """Have the learners recompute the recorded log-probs of `run.replay_check` rollouts; a gap in exact fp32 is told at once.

        Only rollouts of the learners' weights can be compared, so from the second step on there are none where batches are generated ahead.
        """
        current = [rollout for rollout, age in zip(rollouts, staleness(rollouts, self.crew.version), strict=True) if age == 0]
        chosen = choose_rollouts(current, self.recipe.run.replay_check, step)
        if not chosen:
            return {}
        metrics = self.crew.learn("replay_check", chosen)
        if self.recipe.model.dtype == "float32" and not metrics["replay/max_gap"] <= TOLERANCE:
            self.progress.message(gap_warning(step, metrics["replay/max_gap"]))
        return metrics

    def keep_rollouts(self, step: int, issued: Issued, rollouts: list[Rollout], texts: list[str]) -> None:
        """Dump a sample of what was generated, at the recipe's pace and at the first and the last step."""
        every = self.recipe.run.rollouts_every
        if step % every and step not in (1, self.recipe.run.steps):
            return
        shown = rollouts[:SAMPLES_SHOWN]
        pairs = [(plain(example.prompt), text) for example, text in zip(issued.examples, texts, strict=True)]
        strings = [token_strings(self.tokenizer, rollout.completion_ids) for rollout in shown]
        dump_rollouts(rollout_path(self.folder, step), step, shown, pairs[: len(shown)], strings, token_namer(self.tokenizer))

    def _evaluate(self, phase: str) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        with self.span("eval"):
            if self.recipe.task.reward["name"] != "none":
                metrics |= evaluate(self.crew, self.recipe, self.eval_task, self.tokenizer)
            if task_kind(self.recipe) == "documents":
                metrics |= evaluate_documents(self.crew, self.recipe, self.eval_task, self.tokenizer)
            if self.pairs is not None:
                metrics |= {"data/pairs": len(self.pairs.train), "data/bad_pairs": self.pairs.num_bad}
                metrics |= evaluate_pairs(self.crew, self.recipe, self.pairs.held_out, phase == "pairs", self.needs_reference)
        return metrics

    def _log(self, phase: str, step: int, row: dict[str, Any]) -> None:
        wall = self.wall_before + self.clock.window()[1] - self.started
        row = {"phase": phase, "step": step, "wall_s": wall, **row}
        self.trackers.log(row)
        self.progress.update(step, **row)

    def _checkpoint(self, phase: str, step: int) -> Path:
        return self.folder / "checkpoints" / checkpoint_name(phase, step)

    def _phase_start(self, phase: str) -> Path:
        """The model that a phase starts from: the end of the one before, or the run's first model."""
        phases = self.recipe.run.phases
        before = phases[: phases.index(phase)]
        return self._checkpoint(before[-1], self.recipe.sft.steps) / "hf" if before else self.model_path

    def _save(self, phase: str, step: int) -> None:
        folder = self._checkpoint(phase, step)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        self.crew.learn("save", str(folder), self.tokenizer)
        if self.needs_reference and self.recipe.algorithm.reference.startswith("sync_every:"):
            self.crew.save_reference(str(folder / "reference"))
        wall = self.wall_before + self.clock.window()[1] - self.started
        write_manifest(folder, {"phase": phase, "step": step, "wall_s": wall, "process": os.getpid()})
        remove_old_checkpoints(self.folder, self.recipe.run.keep_checkpoints)


def last_position(folder: Path, phases: list[str]) -> tuple[tuple[str, int] | None, float]:
    """Where a run folder stands by its newest sealed checkpoint, and the seconds spent until then.

    Raises:
        CheckpointError: the newest checkpoint is corrupt.
    """
    sealed = sealed_checkpoints(folder)
    if not sealed:
        return None, 0.0
    manifest = read_manifest(sealed[-1])
    return (manifest["phase"], manifest["step"]), float(manifest["wall_s"])
