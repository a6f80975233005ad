"""A stranger who does what CONTRIBUTING.md says gets what it says: each new file is written into a copy of the tree and its command run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^### (\w[\w ]*)\n\n`((?:rlhub|rewards|workers)/[\w/]+\.py)`.*?```python\n(.*?)```\n\n    (rlhub .*?)\n", re.M | re.S)
PARTS = {name: (file, code, shlex.split(command)) for name, file, code, command in SECTION.findall((ROOT / "CONTRIBUTING.md").read_text())}
KINDS = {"Objective", "Advantage", "Views", "Likelihood", "Sampler", "Reward", "Task", "Model family", "Transport", "Lab"}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a checkout holds, with every new file of the page."""
    for folder in ("rlhub", "rewards", "workers", "recipes", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file, code, _ in PARTS.values():
        assert not (tmp_path / file).exists(), f"{file} exists, so that the page's example would replace it"
        (tmp_path / file).write_text(code)
    return tmp_path


def run(tree: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", *command]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)})


def test_the_page_has_every_kind_of_part():
    assert set(PARTS) == KINDS


def test_all_new_parts_work_together(tree):
    overrides = [word for name in KINDS - {"Lab"} for word in PARTS[name][2] if "=" in word and not word.startswith("run.")]
    done = run(tree, ["rlhub", "train", "examples/small.yaml", *overrides])
    assert done.returncode == 0, done.stderr
    assert (tree / "runs" / "small" / "report.html").exists()
    config = (tree / "runs" / "small" / "config.yaml").read_text()
    names = [Path(PARTS[name][0]).stem for name in KINDS - {"Lab"}]
    assert [name for name in names if name not in config] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_command_runs_as_it_stands(name, tree):
    done = run(tree, PARTS[name][2])
    assert done.returncode == 0, done.stderr
