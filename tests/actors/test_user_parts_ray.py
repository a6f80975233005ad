"""A run on Ray actors whose parts are files beside the recipe, in a folder where modules have the names of our packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = "import sys; from rlhub.commands.main import main; sys.argv[0] = 'rlhub'; main()"
RECIPE = """
run: {name: own, steps: 1, phases: [online], eval_every: 1, checkpoint_every: 1, runtime: ray}
model: {config: {d_model: 32, n_layers: 1, n_heads: 2, mlp_hidden_size: 64, max_sequence_length: 32}}
task: {name: ./my_task.py, train: {digits: 4}, eval: {test_size: 8}, eval_rows: 8, reward: {name: ./my_reward.py}}
sampler: {name: ./my_sampler.py, length: 4, steps: 4, block_length: 4}
algorithm:
  advantage: {name: my_advantage}
  views: {name: ./my_views.py, draws: 2}
  objective: {name: ./my_objective.py}
  prompts_per_step: 2
  completions_per_prompt: 2
roles: {scorers: 0}
learner: {backend: torch, micro_batch_tokens: 128}
"""
SOURCES = {
    "my_task": "rlhub/tasks/sort.py",
    "my_reward": "rewards/exact_match.py",
    "my_sampler": "rlhub/samplers/low_confidence.py",
    "my_advantage": "rlhub/advantages/group_mean.py",
    "my_views": "rlhub/views/coupled.py",
    "my_objective": "rlhub/objectives/sequence_clip.py",
}


@pytest.mark.slow
def test_actors_load_files_beside_the_recipe_and_our_packages(tmp_path: Path) -> None:
    for name, source in SOURCES.items():
        shutil.copy(ROOT / source, tmp_path / f"{name}.py")
    for name in ("rewards", "workers", "rlhub"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not the package')\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", CONSOLE]
    done = subprocess.run([*command, "train", "recipe.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "online" and last["step"] == 1 and last["num_samples"] == 4
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "my_advantage.py").rename(elsewhere / "my_advantage.py")  # a module is looked for where the command runs
    done = subprocess.run([*command, "eval", "../runs/own", "--json"], cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
