"""`plan`, `report`, `reward test` and training in one process need none of the extras; what needs one names it in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhub.extras import EXTRAS

ROOT = Path(__file__).parents[2]
SORT = str(ROOT / "recipes" / "sort.yaml")
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

MISSING = {missing!r}
sys.meta_path[:] = map(Without, sys.meta_path)
"""
SMALL = [
    *("run.runtime=local", "learner.backend=torch", "run.steps=1", "sft.steps=1", "task.eval_rows=8", "sft.batch_size=8"),
    *("model.config.d_model=16", "model.config.n_layers=1", "algorithm.prompts_per_step=2", "algorithm.completions_per_prompt=2"),
]


def rlhub(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a process that finds none of the extras and no vLLM, and neither do the processes that it starts for graders."""
    start = folder / "start"
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(WITHOUT.replace("{missing!r}", repr([*EXTRAS, "vllm"])))
    environment = os.environ | {"PYTHONPATH": f"{start}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, "-m", "rlhub", *arguments], capture_output=True, text=True, cwd=folder, env=environment)


def test_what_the_core_does_alone(tmp_path):
    (tmp_path / "done.jsonl").write_text('{"prompt": "2 + 2", "completion": "so 4", "answer": "4", "label": true}\n')
    planned = rlhub(tmp_path, "plan", SORT)
    assert planned.returncode == 0 and "16 x 8 = 128 sequences" in planned.stdout, planned.stderr
    graded = rlhub(tmp_path, "reward", "test", "math_answer", "--data", "done.jsonl")
    assert graded.returncode == 0 and "label right" in graded.stdout, graded.stderr
    trained = rlhub(tmp_path, "train", SORT, "run.name=tiny", *SMALL)
    assert trained.returncode == 0 and trained.stdout.endswith("runs/tiny\n"), trained.stderr
    (tmp_path / "runs" / "tiny" / "report.html").unlink()
    reported = rlhub(tmp_path, "report", "runs/tiny")
    assert reported.returncode == 0 and (tmp_path / "runs" / "tiny" / "report.html").exists(), reported.stderr


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["train", SORT, "run.runtime=ray"], "ray"),
        (["train", SORT, "run.runtime=local", "learner.backend=deepspeed"], "deepspeed"),
        (["train", SORT, *SMALL, "run.trackers=[tensorboard]"], "tensorboard"),
        (["plan", str(ROOT / "recipes" / "digits.yaml")], "sklearn"),
        (["reward", "test", "digit_class", "--data", "done.jsonl"], "sklearn"),
        (["reward", "test", "judge", "url=http://127.0.0.1:9/v1", "model=m", "score=[0,1]", "--data", "done.jsonl"], "openai"),
        (["reward", "test", "http", "url=http://127.0.0.1:9", "--data", "done.jsonl"], "aiohttp"),
        (["reward", "serve", "exact_match", "--port", "0"], "aiohttp"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_line_names_the_extra(arguments, module, tmp_path):
    (tmp_path / "done.jsonl").write_text('{"prompt": "2 + 2", "completion": "4", "answer": "4", "label": true}\n')
    done = rlhub(tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{module} is not installed; pip install 'rlhub[{EXTRAS[module]}]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_every_extra_is_declared_and_none_is_in_the_core():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {"sklearn": "scikit-learn"}
    for module, extra in EXTRAS.items():
        package = packages.get(module, module)
        assert any(line.startswith(package) for line in project["optional-dependencies"][extra]), module
        assert not any(line.startswith(package) for line in project["dependencies"]), module
    everything = project["optional-dependencies"]["all"][0]
    assert set(everything.removeprefix("rlhub[").removesuffix("]").split(",")) == set(EXTRAS.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_alone_in_a_fresh_environment(tmp_path):
    """The core's own dependencies suffice, and bring none of what the extras are for."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"
    for name in ("rlhub", "workers", "rewards"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    fresh = tmp_path / "fresh" / "bin"
    (wheel,) = tmp_path.glob("rlhub-*.whl")
    installed = subprocess.run([*pip, "--python", fresh / "python", "install", "--quiet", wheel], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the core's packages cannot be installed here: {installed.stderr.splitlines()[-1]}")
    listed = subprocess.run([*pip, "--python", fresh / "python", "list", "--format=freeze"], capture_output=True, text=True).stdout
    names = {line.partition("==")[0].replace("_", "-") for line in listed.splitlines()}
    assert not names & {*EXTRAS, "scikit-learn", "vllm"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([fresh / "rlhub", "plan", SORT], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "16 x 8 = 128 sequences" in done.stdout, done.stderr
