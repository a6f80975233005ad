"""One run: its folder, its crew, where it stands, and what is written when."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rewards.answers.text import plain
from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.health import staleness
from rlhub.algorithm.replay import TOLERANCE, choose_rollouts, gap_warning
from rlhub.checkpoints.folders import stop_ids_of
from rlhub.checkpoints.sealed import checkpoint_folder, read_manifest, remove_old_checkpoints, sealed_checkpoints, write_manifest
from rlhub.config.schema import AlgorithmConfig, OptimizerConfig, Recipe
from rlhub.config.tasks import task_kind
from rlhub.errors import UserError
from rlhub.noise import Noise
from rlhub.phases import Phase
from rlhub.records.metrics import SpanClock, busy_union, idle_share
from rlhub.records.progress import RunProgress
from rlhub.records.rollout_log import dump_rollouts, rollout_path, token_namer, token_strings
from rlhub.records.step_record import Metric, Metrics, StepRecord
from rlhub.records.trackers import Trackers
from rlhub.tasks import Task
from rlhub.training.documents import evaluate_documents
from rlhub.training.grade_checks import GradeWatch
from rlhub.training.held_out import evaluate
from rlhub.training.pairs import PairData, evaluate_pairs
from rlhub.training.rollouts import Issued
from rlhub.types import Rollout
from workers.crew import Crew

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Position = tuple[Phase, int]  # the phase and its last finished step
SAMPLES_SHOWN = 32  # rollouts kept in each dump


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the current step; a second one stops at once."""

    def __init__(self, progress: RunProgress) -> None:
        self.requested, self.progress = False, progress
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.progress.message("stopping after this step with a checkpoint; once more stops at once")


@dataclass
class Session:
    """The state that the loops share, and what each part of a step does beside calling workers.

    A phase begins with `begin` and `record_start`; each step is opened, closed, logged and saved by its loop.
    """

    recipe: Recipe
    folder: Path
    model_path: Path  # what the first phase started from
    tokenizer: PreTrainedTokenizerFast
    train_task: Task
    eval_task: Task
    crew: Crew
    trackers: Trackers
    progress: RunProgress
    position: Position | None  # of the checkpoint that the run continues from
    stop: StopRequest
    wall_before: float = 0.0  # seconds of earlier attempts
    pairs: PairData | None = None  # preference data, where the recipe has some
    noise: Noise = field(init=False)
    clock: SpanClock = field(default_factory=SpanClock)
    phase: Phase = field(init=False)  # that was begun last, as all that follows
    algorithm: Algorithm = field(init=False)
    num_steps: int = field(default=0, init=False)
    eval_every: int = field(default=1, init=False)
    grades: GradeWatch = field(init=False)
    reference_path: Path | None = None  # model folder of the scorers as the phase, or its resumed part, began

    def __post_init__(self) -> None:
        self.noise = Noise(self.recipe.run.seed)
        self.grades = GradeWatch(self.recipe.reward_pool.failed_steps)
        self.started = self.clock.start

    @property
    def needs_reference(self) -> bool:
        """Whether the phase compares with a reference that scorers hold."""
        return self.algorithm.needs_scorers

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer of the run's model."""
        return stop_ids_of(self.model_path)

    @property
    def preferences(self) -> PairData:
        """The preference data of a recipe that trains on some."""
        assert self.pairs is not None, "run.phases and task.name say whether preferences are loaded"
        return self.pairs

    def span(self, name: str) -> AbstractContextManager[None]:
        """Count the time of a `with` block as `time/<name>_s` of this step."""
        return self.clock.span(name)

    def begin(self, phase: Phase, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, num_steps: int, eval_every: int) -> Algorithm:
        """Prepare the learners for a phase, and the reference when its objective needs one; the composed algorithm."""
        self.phase, self.num_steps, self.eval_every = phase, num_steps, eval_every
        self.algorithm = Algorithm.compose(algorithm)
        start = self._phase_start(phase)
        resumed = None if self.position is None or self.position[0] != phase else checkpoint_folder(self.folder, *self.position)
        self.crew.learners.begin(algorithm, optimizer, num_steps * algorithm.updates, str(start))
        if resumed is not None:
            self.crew.learners.load(str(resumed))
        self.reference_path = None
        if self.needs_reference:
            followed = start if resumed is None else resumed / "reference"
            self.reference_path = followed if followed.exists() else start
            self.crew.scorers.load(str(self.reference_path))
        return self.algorithm

    def record_start(self) -> None:
        """Give the generators the weights that the phase starts from, and log what these can do as step 0."""
        done = self._num_done()
        self.progress.phase(self.phase, self.num_steps, done)
        if self.crew.generators.handles:
            self.publish(done)
        if done == 0:
            self.clock.reset()
            record = StepRecord(self.phase, 0)
            record.add(self.evaluate())
            self.log(record)

    def remaining_steps(self) -> range:
        """The steps of the phase that are still to be made, counted from 1."""
        return range(self._num_done() + 1, self.num_steps + 1)

    def open_step(self, step: int) -> StepRecord:
        """Start the clocks of a step."""
        self.clock.reset()
        self.crew.runtime.take_intervals()
        return StepRecord(self.phase, step)

    def publish(self, step: int) -> Metrics:
        """Send the learners' weights after a step to the generators. Versions count the steps of all phases, so they grow through a run."""
        offset = self.recipe.sft.steps if self.phase != Phase.SFT and Phase.SFT in self.recipe.run.phases else 0
        receipt = self.crew.publish(offset + step, self.recipe.weights.in_flight)
        return {"sync/receipt_ok": 1.0, "sync/version": receipt.version, "system/sync_bytes": receipt.num_bytes}

    def renews_reference(self, step: int) -> bool:
        """Whether the reference becomes the policy after a step: with `sync_every:N`, every N steps."""
        name, _, every = self.recipe.algorithm.reference.partition(":")
        return name == "sync_every" and self.needs_reference and step % int(every) == 0

    def costs(self, num_samples: int) -> Metrics:
        """What the step cost until now: time per phase, idle share per role and what the controller itself took."""
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
        lost = self.crew.generators.num_lost + self.crew.graders.num_lost
        throughput = {"throughput/samples_per_s": num_samples / seconds, "num_samples": num_samples}
        return times | idle | throughput | ({"system/workers_lost": lost} if lost else {})

    def check_replay(self, step: int, rollouts: list[Rollout]) -> Metrics:
        """Have the learners recompute the recorded log-probs of `run.replay_check` rollouts; a gap in exact fp32 is told at once.

        Only rollouts of the learners' weights can be compared, so from the second step on there are none where batches are generated ahead.
        """
        current = [rollout for rollout, age in zip(rollouts, staleness(rollouts, self.crew.version), strict=True) if age == 0]
        chosen = choose_rollouts(current, self.recipe.run.replay_check, step)
        if not chosen:
            return {}
        metrics = self.crew.learners.replay_check(chosen)
        if self.recipe.model.dtype == "float32" and not metrics["replay/max_gap"] <= TOLERANCE:
            self.progress.message(gap_warning(step, metrics["replay/max_gap"]))
        return metrics

    def tell_silence(self, metrics: Metrics) -> None:
        """Say once, in the terminal, that steps teach nothing."""
        message = self.grades.silence(metrics)
        if message is not None:
            self.progress.message(message)

    def keep_rollouts(self, step: int, issued: Issued, rollouts: list[Rollout], texts: list[str]) -> None:
        """Dump a sample of what was generated, at the recipe's pace and at the first and the last step."""
        every = self.recipe.run.rollouts_every
        if step % every and step not in (1, self.recipe.run.steps):
            return
        shown = rollouts[:SAMPLES_SHOWN]
        pairs = [(plain(example.prompt), text) for example, text in zip(issued.examples, texts, strict=True)]
        strings = [token_strings(self.tokenizer, rollout.completion_ids.tolist()) for rollout in shown]
        dump_rollouts(rollout_path(self.folder, step), step, shown, pairs[: len(shown)], strings, token_namer(self.tokenizer))

    def evaluates(self, step: int) -> bool:
        """Whether the policy is evaluated after a step."""
        return step % self.eval_every == 0 or step == self.num_steps

    def evaluate(self) -> Metrics:
        """Held-out metrics of the learners' policy, as the task has them."""
        metrics: dict[str, Metric] = {}
        with self.span("eval"):
            if self.recipe.task.reward["name"] != "none":
                metrics |= evaluate(self.crew, self.recipe, self.eval_task, self.tokenizer)
            if task_kind(self.recipe) == "documents":
                metrics |= evaluate_documents(self.crew, self.recipe, self.eval_task, self.tokenizer)
            if self.pairs is not None:
                metrics |= {"data/pairs": len(self.pairs.train), "data/bad_pairs": self.pairs.num_bad}
                metrics |= evaluate_pairs(self.crew, self.recipe, self.pairs.held_out, self.phase == Phase.PAIRS, self.needs_reference)
        return metrics

    def log(self, record: StepRecord) -> None:
        """Write a step's row to all trackers and show it."""
        row = record.row(self._wall_seconds())
        self.trackers.log(row)
        self.progress.update(record.step, **row)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, as it is where the user stops."""
        every = self.eval_every if self.phase == Phase.SFT else self.recipe.run.checkpoint_every
        return step == self.num_steps or step % every == 0 or self.stop.requested

    def save(self, step: int) -> None:
        """Write and seal a checkpoint, and remove the oldest."""
        folder = checkpoint_folder(self.folder, self.phase, step)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        self.crew.learners.save(str(folder), self.tokenizer)
        if self.needs_reference and self.recipe.algorithm.reference.startswith("sync_every:"):
            self.crew.scorers.save(str(folder / "reference"))
        write_manifest(folder, {"phase": self.phase, "step": step, "wall_s": self._wall_seconds(), "process": os.getpid()})
        remove_old_checkpoints(self.folder, self.recipe.run.keep_checkpoints)

    def _num_done(self) -> int:
        return self.position[1] if self.position is not None and self.position[0] == self.phase else 0

    def _wall_seconds(self) -> float:
        return self.wall_before + self.clock.window()[1] - self.started

    def _phase_start(self, phase: Phase) -> Path:
        """The model that a phase starts from: the end of the one before, or the run's first model."""
        phases = self.recipe.run.phases
        before = phases[: [Phase(name) for name in phases].index(phase)]
        return checkpoint_folder(self.folder, Phase(before[-1]), self.recipe.sft.steps) / "hf" if before else self.model_path


def check_gradient(metrics: Metrics) -> None:
    """Refuse to go on from a step whose gradient is not finite.

    Raises:
        UserError: it is not, so the learners' weights are of no use.
    """
    norm = metrics.get("grad_norm", 0.0)
    if not math.isfinite(float(norm)):
        raise UserError(
            f"the gradient norm is {norm} after this step, so the weights are lost; the last checkpoint is whole: "
            "start again under another run.name with a lower learning rate, or from that checkpoint with model.path"
        )


def last_position(folder: Path) -> tuple[Position | None, float]:
    """Where a run folder stands by its newest sealed checkpoint, and the seconds spent until then.

    Raises:
        CheckpointError: the newest checkpoint is corrupt.
    """
    sealed = sealed_checkpoints(folder)
    if not sealed:
        return None, 0.0
    manifest = read_manifest(sealed[-1])
    return (Phase(manifest["phase"]), manifest["step"]), float(manifest["wall_s"])
