"""The examples run as they are documented."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlhub

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TRIED = {"custom_training_loop.py", "my_objective.py", "my_objective.yaml", "small.yaml"}  # the last one by test_contributing


def test_every_example_is_tried_here():
    assert {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".yaml")} == TRIED


def imported(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_custom_loop_takes_both_kinds_of_step(capsys):
    before, after = imported("custom_training_loop").main(supervised_steps=20, policy_steps=2)
    assert 0 <= before <= 1 and 0 <= after <= 1
    assert "after 2 policy steps" in capsys.readouterr().out


@pytest.mark.slow
def test_the_custom_loop_learns():
    before, after = imported("custom_training_loop").main(supervised_steps=150, policy_steps=60)
    assert after > before + 0.1, (before, after)


def test_the_custom_loop_uses_the_public_interface_only():
    tree = ast.parse((EXAMPLES / "custom_training_loop.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names == {"argparse", "torch", "rlhub"} and all(
        node.module == "__future__" for node in imports if isinstance(node, ast.ImportFrom)
    )
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "rlhub"}
    assert used <= set(rlhub.__all__)


def test_an_objective_beside_a_recipe_trains(tmp_path):
    small = ["run.steps=2", "sft.steps=2", "task.eval_rows=8", "algorithm.prompts_per_step=2", "algorithm.completions_per_prompt=2"]
    command = [sys.executable, "-m", "rlhub", "train", "examples/my_objective.yaml", f"run.output_dir={tmp_path}", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "my_objective" / "metrics.jsonl").read_text().splitlines()]
    assert [row["above_band"] for row in rows if row["phase"] == "online" and row["step"] > 0] == [0.0, 0.0]
