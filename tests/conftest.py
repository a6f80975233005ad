"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from data_files import WANT, missing_data, unchecked

from rlhub.config.recipe import load_recipe
from rlhub.config.schema import Recipe

# Two test processes share two cores; and with the thread count fixed, sums are taken in the same order everywhere.
torch.set_num_threads(1)

TINY = """
run:
  {name: tiny, steps: 4, phases: [sft, online], eval_every: 2, checkpoint_every: 2, keep_checkpoints: 9, rollouts_every: 1, runtime: local}
model: {config: {d_model: 32, n_layers: 2, n_heads: 2, mlp_hidden_size: 64, max_sequence_length: 32}}
task: {name: sort, train: {digits: 4}, eval: {test_size: 16}, eval_rows: 16}
sampler: {length: 4, steps: 4, block_length: 4}
algorithm:
  views: {name: coupled, draws: 2}
  kl: {kind: k2, coefficient: 0.01}
  reference: frozen
  updates: 2
  prompts_per_step: 4
  completions_per_prompt: 4
sft: {steps: 4, batch_size: 8, eval_every: 2}
learner: {backend: torch, micro_batch_tokens: 128, optimizer: {learning_rate: 1.0e-3, warmup_steps: 0}}
"""

GRADERS = '''
import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent

def ascending(prompt, completion, row):
    """Dense, so that a model of random weights has something to learn from."""
    words = completion.split()
    return sum(left <= right for left, right in zip(words, words[1:])) / 3

def stopping(prompt, completion, row):
    """Ctrl-C while a file named `stop` asks for it."""
    if (HERE / "stop").exists():
        (HERE / "stop").unlink()
        os.kill(os.getppid(), signal.SIGINT)
    return ascending(prompt, completion, row)

def picky(prompt, completion, row):
    """Fails on a part of what it is given."""
    if completion[:1] in "56789":
        raise ZeroDivisionError(completion)
    return ascending(prompt, completion, row)

def broken(prompt, completion, row):
    raise ZeroDivisionError("always")

def hanging(prompt, completion, row):
    if completion[:1] == "7":
        time.sleep(60)
    return ascending(prompt, completion, row)

def slow(prompt, completion, row):
    time.sleep(0.05)
    return ascending(prompt, completion, row)
'''


@pytest.fixture(scope="module")
def quick_report() -> Iterator[None]:
    """No report at the end of runs: reports have tests of their own, and plots take longer than the runs of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhub.training.run.write_report", lambda folders: folders[0] / "report.html")
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """`tiny("key=value", grader="ascending")`: SFT and ESPO that train in a second, in this process unless it is overridden."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "graders.py").write_text(GRADERS)

    def recipe(*overrides: object, grader: str = "ascending") -> Recipe:
        return load_recipe(folder / "tiny.yaml", [f"task.reward.name={folder}/graders.py:{grader}", *map(str, overrides)])

    recipe.folder = folder
    return recipe


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs_data"):
        for name in missing_data(mark.args):
            pytest.skip(f"{WANT}{name}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", ())
    for line in unchecked(report.longrepr[2] for report in reports if isinstance(report.longrepr, tuple | list)):
        terminalreporter.write_line(line, yellow=True)
