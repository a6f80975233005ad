"""The replay check: gaps at rounding for every kind of trace, large ones for planted faults, and what a run says of them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from rlhub.algorithm.replay import STATES, choose_rollouts
from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, Recipe, SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.models.llada import Config, LLaDA
from rlhub.noise import Noise
from rlhub.records.metrics import read_metrics
from rlhub.tasks._vocabulary import word_level
from rlhub.training.run import train
from rlhub.types import NEVER, Request, Rollout
from workers.generator import Generator
from workers.learner import Learner

pytestmark = pytest.mark.usefixtures("quick_report")

LENGTH = 8


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    """Of a random model that is unsure but not indifferent."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_level([str(digit) for digit in range(10)])
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 48, "max_sequence_length": 64, "init_std": 0.2}
    save_network(LLaDA(Config(**shape, **ids)).initialize(torch.Generator().manual_seed(1)), folder, tokenizer)
    made = Learner(str(folder), LearnerConfig(backend="torch", micro_batch_tokens=40), run_seed=0)
    made.begin(AlgorithmConfig(), OptimizerConfig(), total_updates=1)
    return made


def rollouts(learner: Learner, count: int = 6, **settings: object) -> list[Rollout]:
    requests = [Request(uid, uid, np.arange(3 + uid % 3, dtype=np.int32)) for uid in range(count)]
    base = {"length": LENGTH, "steps": LENGTH, "block_length": LENGTH, "temperature": 1.0}
    return Engine(learner.network).generate(requests, SamplerConfig(**(base | settings)), Noise(3))


TRACES = {
    "low_confidence": {},
    "two blocks, two tokens a step": {"block_length": 4, "steps": 4},
    "cold, truncated law": {"name": "random", "temperature": 0.5, "top_k": 5, "top_p": 0.9},
    "greedy": {"name": "left_to_right", "temperature": 0.0},
    "threshold": {"name": "threshold", "options": {"threshold": 0.3}},
    "no end of text": {"eos": "never"},
    "filled after the end of text": {"block_length": 2, "name": "random"},
    "edits": {"name": "edit", "options": {"threshold": 0.3, "editing_threshold": 0.15, "max_post_steps": 4}},
    "guidance": {"guidance": 1.5},
    "guidance in an interval": {"guidance": 1.5, "guidance_interval": [0.3, 0.8]},
}


@pytest.mark.parametrize("settings", TRACES.values(), ids=TRACES)
def test_recorded_log_probs_come_out_again(learner: Learner, settings: dict) -> None:
    made = rollouts(learner, **settings)
    if settings.get("name") == "edit":
        assert sum(len(rollout.edits) for rollout in made) > 3, "the model must be unsure enough to edit"
    metrics = learner.replay_check(made)
    assert metrics["replay/max_gap"] < 1e-5 and metrics["replay/mean_gap"] <= metrics["replay/max_gap"]
    assert metrics["replay/num_tokens"] == sum((rollout.unmask_step != NEVER).sum() for rollout in made)


def test_one_state_is_what_the_model_says_of_the_canvas_at_that_time(learner: Learner) -> None:
    """By hand: the log-softmax of the model on the prompt and what stood before the step."""
    (made,) = rollouts(learner, 1, steps=4)
    expected = []
    for step in range(4):
        canvas = np.where(made.unmask_step >= step, learner.network.mask_id, made.completion_ids)
        from rlhub.inference import Model

        logits = Model(learner.network, Path()).logits([[*made.prompt_ids, *canvas]])[0, 3:]
        for position in np.flatnonzero(made.unmask_step == step):
            expected.append(logits[position].log_softmax(-1)[made.completion_ids[position]].item())
    shifted = dataclasses.replace(made, logp_model=made.logp_model + np.float32(0.25))
    metrics = learner.replay_check([shifted])
    assert metrics["replay/mean_gap"] == pytest.approx(0.25, abs=1e-5) == metrics["replay/max_gap"]
    order = np.lexsort((np.arange(LENGTH), made.unmask_step))
    assert made.logp_model[order] == pytest.approx(expected, abs=1e-5)


def test_long_rollouts_are_replayed_in_part(learner: Learner) -> None:
    made = rollouts(learner, 2, length=24, steps=24, block_length=24)
    assert learner.replay_check(made)["replay/num_tokens"] == 2 * STATES


def planted(rollout: Rollout, fault: str) -> Rollout:
    if fault == "steps in another order":
        return dataclasses.replace(rollout, unmask_step=rollout.unmask_step[::-1].copy())
    if fault == "log-probs of the tempered law":
        return dataclasses.replace(rollout, logp_model=rollout.logp_sample)
    if fault == "edits forgotten":
        return dataclasses.replace(rollout, edits=())
    if fault == "guidance forgotten":
        return dataclasses.replace(rollout, sampler={**rollout.sampler, "guidance": 0.0})
    return rollout


FAULTS = {
    "steps in another order": {},
    "log-probs of the tempered law": {"temperature": 0.5},
    "edits forgotten": TRACES["edits"],
    "guidance forgotten": TRACES["guidance"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_trace_that_is_not_true_is_found(learner: Learner, fault: str) -> None:
    made = [planted(rollout, fault) for rollout in rollouts(learner, **FAULTS[fault])]
    assert learner.replay_check(made)["replay/max_gap"] > 0.05


def test_a_single_wrong_weight_is_found(learner: Learner) -> None:
    made, weight = rollouts(learner), next(learner.network.parameters())
    with torch.no_grad():
        weight[int(made[0].prompt_ids[0]), 0] += 0.5
        gap = learner.replay_check(made)["replay/max_gap"]
        weight[int(made[0].prompt_ids[0]), 0] -= 0.5
    assert gap > 1e-2


def test_approximate_rollouts_are_left_out_and_turns_are_taken(learner: Learner) -> None:
    made = rollouts(learner)
    stale = [dataclasses.replace(rollout, sampler={**rollout.sampler, "cache": "dual"}) for rollout in made]
    assert choose_rollouts(stale, 2, 1) == [] and choose_rollouts(made, 0, 1) == []
    assert len(choose_rollouts(made, 99, 1)) == len(made)
    chosen = [rollout.uid for step in range(3) for rollout in choose_rollouts(made, 2, step)]
    assert sorted(chosen) == [rollout.uid for rollout in made]


def run(tiny: Callable[..., Recipe], folder: Path, *overrides: str) -> tuple[list[dict], str]:
    console = Console(file=io.StringIO(), width=400)
    path = train(tiny(f"run.output_dir={folder}", "run.phases=[online]", "run.steps=2", "eval_temperatures=[0.0]", *overrides), console)
    return [row for row in read_metrics(path / "metrics.jsonl") if row["step"]], console.file.getvalue()


def test_every_step_of_a_run_is_checked(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    steps, said = run(tiny, tmp_path, "run.replay_check=2")
    assert len(steps) == 2 and all(row["replay/max_gap"] < 1e-5 and row["replay/num_tokens"] == 8 for row in steps)
    assert all(0 < row["time/replay_s"] < row["time/step_s"] for row in steps) and "replay check" not in said


def test_a_run_with_other_weights_in_its_generator_is_warned(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Generator.generate

    @wraps(generate)
    def drifting(self: Generator, *arguments: object) -> list[Rollout]:
        with torch.no_grad():
            for weight in self.network.parameters():
                weight += 0.05 * weight.sign()
        return generate(self, *arguments)

    monkeypatch.setattr(Generator, "generate", drifting)
    steps, said = run(tiny, tmp_path)
    assert all(row["replay/max_gap"] > 1e-3 for row in steps)
    assert said.count("replay check") == 2 and "weights.transport" in said and "model.dtype" in said


def test_it_can_be_switched_off(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    steps, _ = run(tiny, tmp_path, "run.replay_check=0")
    assert not any(key.startswith("replay/") for row in steps for key in row)
