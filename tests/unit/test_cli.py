"""The command line: help, one-line errors, exit codes, and what is handed to the functions behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from rlhub.commands.main import main
from rlhub.commands.sample import split_prompts
from rlhub.errors import CheckpointError

RECIPES = Path(__file__).parents[2] / "recipes"
SORT = str(RECIPES / "sort.yaml")
COMMANDS = ["train", "eval", "sample", "plan", "export", "report"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))  # for subprocesses, where rlhub is not installed


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def replace(monkeypatch, module: str, **functions) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"rlhub {command} " in result.stdout.split("Examples:")[1]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from rlhub.commands.main import main\n"
        "try: main(['--help'])\n"
        "finally: print('loaded:', {'torch', 'ray', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules))"
    )
    assert "loaded: set()" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_python_dash_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "rlhub", "plan", "no.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no recipe file 'no.yaml'")


BAD = [
    # arguments after the command, what the line must hold: the value and the fix
    (["recipes.yaml"], ["'recipes.yaml'", "no recipe file"]),
    ([str(RECIPES / "srt.yaml")], ["srt.yaml", "did you mean", "sort.yaml"]),
    ([str(RECIPES)], ["recipes", "cannot read"]),
    ([], ["RECIPE"]),
    ([SORT, "--run.steps=3"], ["--run.steps", "key=value"]),
    ([SORT, "run.steps"], ["'run.steps'", "key=value"]),
    ([SORT, "run.stps=3"], ["run.stps", "did you mean steps"]),
    ([SORT, "rn.steps=3"], ["'rn.steps=3'", "did you mean run"]),
    ([SORT, "run.steps=three"], ["'three'", "a whole number"]),
    ([SORT, "run.steps=-4"], ["-4", "at least 1"]),
    ([SORT, "run={steps: 3"], ["'{steps: 3'", "close"]),
    ([SORT, "run.runtime=rai"], ["'rai'", "did you mean ray"]),
    ([SORT, "model.dtype=float16"], ["'float16'", "did you mean bfloat16"]),
    ([SORT, "model.family=lada"], ["'lada'", "did you mean llada"]),
    ([SORT, "model.config.d_mdel=8"], ["d_mdel", "did you mean d_model"]),
    ([SORT, "model.config.max_sequence_length=12"], ["16", "12", "shorten"]),
    ([SORT, "model.path=weights/none"], ["'weights/none'", "null for random weights"]),
    ([SORT, "task.name=srt"], ["'srt'", "did you mean sort"]),
    ([SORT, "task.train.digits=0"], ["digits", "at least 1", "0"]),
    ([SORT, "task.reward.name=exact"], ["'exact'", "exact_match"]),
    ([SORT, "task.reward.nme=exact"], ["nme", "exact_match"]),
    ([SORT, "sampler.length=10"], ["10", "8 or 16"]),
    ([SORT, "sampler.steps=16"], ["16", "at most 8"]),
    ([SORT, "sampler.options.tau=0.5"], ["tau", "low_confidence"]),
    ([SORT, "algorithm.views.drws=2"], ["drws", "did you mean draws"]),
    ([SORT, "algorithm.objective.name=token_clp"], ["'token_clp'", "did you mean token_clip"]),
    ([SORT, "algorithm.reference=none"], ["algorithm.reference", "=frozen"]),
    ([SORT, "algorithm.reference=ema"], ["'ema'", "sync_every:64"]),
    ([SORT, "algorithm.completions_per_prompt=1"], ["at least 2", "1"]),
    ([SORT, "algorithm.max_staleness=2"], ["algorithm.correction", "low_confidence", "correction=none", "max_staleness=0"]),
    ([SORT, "algorithm.on_invalid=zero"], ["'zero'", "drop_sample"]),
    ([SORT, "roles.learners=2"], ["2", "run.runtime=ray"]),
    ([SORT, "learner.micro_batch_tokens=7"], ["7", "at least 8"]),
    ([SORT, "learner.micro_batch_tokens=12"], ["12", "at least 16"]),
    ([SORT, "roles.scorers=0"], ["0 scorers", "at least 1"]),
    ([SORT, "learner.backend=fsdp"], ["'fsdp'", "deepspeed"]),
    ([SORT, "learner.optimizer.betas=0.9"], ["0.9", "a list of 2 items"]),
]


@pytest.mark.parametrize(("arguments", "wanted"), BAD, ids=lambda value: value[-1] if value else "none")
def test_bad_input_ends_in_one_clear_line(arguments, wanted, tmp_path):
    result = run("plan", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in wanted:
        assert part in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[SORT, "run.stps=3"], [SORT, "sampler.length=10"], ["no.yaml"], [SORT, "roles.gpus_per_learner=1"]])
def test_train_refuses_before_it_writes(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    replace(monkeypatch, "rlhub.training.run", train=lambda recipe: pytest.fail("training began"))
    result = run("train", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["trian"], ["plan", SORT, "--jsn"], ["report"], ["export", "run"]])
def test_misuse_of_commands_is_one_line_too(arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_plan_as_text_and_json(tmp_path):
    assert "16 x 8 = 128 sequences" in run("plan", SORT).stdout
    plan = json.loads(run("plan", SORT, "run.steps=7", "--json").stdout)
    assert (plan["recipe"]["run"]["steps"], plan["batch"]["sequences"]) == (7, 128)
    assert list(tmp_path.iterdir()) == []


def test_train_hands_on_the_recipe(monkeypatch):
    replace(monkeypatch, "rlhub.training.run", train=lambda recipe: Path(recipe.run.output_dir) / recipe.run.name)
    result = run("train", SORT, "run.name=mine")
    assert (result.exit_code, result.stdout) == (0, "runs/mine\n")


def test_an_interrupted_training_says_how_to_go_on(monkeypatch):
    def interrupt(recipe):
        raise KeyboardInterrupt

    replace(monkeypatch, "rlhub.training.run", train=interrupt)
    result = run("train", SORT, "run.resume=false", "eval_temperatures=[0.0, 1.0]")
    assert result.exit_code == 130
    assert result.stderr.endswith(f"rlhub train {SORT} 'eval_temperatures=[0.0, 1.0]'\n")


def test_an_error_of_a_worker_is_one_line(monkeypatch):
    class FromRay(CheckpointError):
        def __init__(self) -> None:
            super().__init__("Traceback ...\n  many lines")
            self.cause = CheckpointError("checkpoint x is damaged: restore it")

    def fail(recipe):
        raise FromRay

    replace(monkeypatch, "rlhub.training.run", train=fail)
    result = run("train", SORT)
    assert (result.exit_code, result.stderr) == (2, "error: checkpoint x is damaged: restore it\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    replace(monkeypatch, "rlhub.training.run", train=lambda recipe: 1 / 0)
    assert isinstance(run("train", SORT).exception, ZeroDivisionError)


def test_eval_prints_what_it_measured(monkeypatch):
    seen = []
    replace(monkeypatch, "rlhub.evals.checkpoint", evaluate_checkpoint=lambda *arguments: seen.append(arguments) or {"accuracy": 0.5})
    assert json.loads(run("eval", "runs/a", "task.eval_rows=4", "--recipe", "r.yaml", "--json").stdout) == {"accuracy": 0.5}
    assert "accuracy" in run("eval", "runs/a").stdout
    assert seen == [(Path("runs/a"), ["task.eval_rows=4"], "r.yaml"), (Path("runs/a"), [], None)]


def test_sample_tells_prompts_from_overrides(monkeypatch):
    seen = []
    replace(monkeypatch, "rlhub.reports.display", show_sample=lambda *arguments: seen.append(arguments))
    run("sample", "runs/a", "3 7 = 10 :", "sampler.temperature=0", "4", "--html", "t.html")
    run("sample", "runs/a", "--file", "prompts.txt")
    assert seen[0] == (Path("runs/a"), ["3 7 = 10 :", "4"], ["sampler.temperature=0"], None, Path("t.html"))
    assert seen[1] == (Path("runs/a"), [], [], Path("prompts.txt"), None)
    assert split_prompts(["seed=3"]) == ([], ["seed=3"])


def test_export_and_report_print_where_they_wrote(monkeypatch):
    replace(monkeypatch, "rlhub.checkpoints.export", export=lambda run, out, adapter_only: out / run.name)
    replace(monkeypatch, "rlhub.reports.page", write_report=lambda runs: Path("-".join(run.name for run in runs)))
    assert run("export", "runs/a", "out").stdout == "out/a\n"
    assert run("report", "runs/a", "runs/b").stdout == "a-b\n"


def test_modules_in_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    Path("mine_for_cli").mkdir()
    config = "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Config:\n    scale: int = 1\n"
    module = f"{config}\ndef assign(rewards, batch, config): ...\n"
    Path("mine_for_cli/credit.py").write_text(module)
    result = run("plan", SORT, "algorithm.advantage.name=mine_for_cli.credit", "algorithm.advantage.scale=2", "--json")
    assert json.loads(result.stdout)["recipe"]["algorithm"]["advantage"] == {"name": "mine_for_cli.credit", "scale": 2}
