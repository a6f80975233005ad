"""An experiment from its file to its table, on a recipe cut to seconds."""

import json
from pathlib import Path
from statistics import stdev

import pytest
import yaml

from rlhub.config.recipe import load_recipe
from rlhub.errors import RecipeError
from rlhub.studies.experiment import load_experiment, mean_interval, run_experiment

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted((RECIPES / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_name_recipes_that_load(path: Path):
    experiment = load_experiment(path)
    for options in [experiment.base, *experiment.arms.values()]:
        load_recipe(path.parent / experiment.recipe, [*experiment.common, *options])


def test_arms_start_from_the_base_of_their_seed_and_a_second_call_runs_nothing(tmp_path: Path):
    file = tmp_path / "tiny.yaml"
    common = ["sft.steps=2", "sft.eval_every=2", "sft.batch_size=4", "run.steps=1", "task.eval_rows=8", "model.config.d_model=16"]
    common += ["model.config.n_layers=1", "model.config.mlp_hidden_size=32", "algorithm.prompts_per_step=2"]
    arms = {"espo": ["run.phases=[online]"], "shuffled": ["run.phases=[online]", "task.shuffle_rewards=true"]}
    content = {"recipe": str(RECIPES / "sort.yaml"), "seeds": [3], "common": common, "base": ["run.phases=[sft]"], "arms": arms}
    file.write_text(yaml.safe_dump(content))
    output = run_experiment(file, tmp_path / "out")
    runs = json.loads((output / "results.json").read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("espo", 3), ("shuffled", 3)]
    assert runs[0]["greedy"][0] == runs[1]["greedy"][0]  # one base
    assert (output / "results.md").read_text().count("| espo |") == 2
    assert (output / "accuracy.png").stat().st_size > 1000 and (output / "report.html").exists()
    written = (output / "espo/seed3/metrics.jsonl").read_bytes()
    run_experiment(file, output)
    assert (output / "espo/seed3/metrics.jsonl").read_bytes() == written


def test_arms_use_what_was_prepared_from_the_base_of_their_seed(tmp_path: Path):
    file = tmp_path / "pairs.yaml"
    common = ["sft.steps=2", "sft.eval_every=2", "sft.batch_size=4", "task.train.digits=3", "task.eval.test_size=8", "task.eval_rows=8"]
    common += ["model.config={d_model: 16, n_layers: 1, n_heads: 2, mlp_hidden_size: 32}", "task.reward={name: contains, texts: ['1']}"]
    common += ["sampler={length: 3, steps: 3, block_length: 3}", "run.steps=1", "algorithm.prompts_per_step=2", "pairs.eval_rows=2"]
    content = {
        "recipe": str(RECIPES / "sort_pairs.yaml"),
        "seeds": [1],
        "common": common,
        "base": ["run.phases=[sft]", "model.path=null"],
        "prepare": ["pairs <base> --out <base>/pairs.jsonl --prompts 256"],
        "arms": {"vrpo": ["pairs.data.path=<base>/pairs.jsonl"]},
    }
    file.write_text(yaml.safe_dump(content))
    output = run_experiment(file, tmp_path / "out")
    pairs = output / "base/seed1/pairs.jsonl"
    assert pairs.stat().st_size > 0
    assert str(pairs) in (output / "vrpo/seed1/config.yaml").read_text()
    written = pairs.stat().st_mtime_ns
    run_experiment(file, output)
    assert pairs.stat().st_mtime_ns == written


def test_interval_is_students():
    gains = [1.0, 2.0, 3.0, 4.0, 10.0]
    half = 2.776 * stdev(gains) / 5**0.5
    assert mean_interval(gains) == f"{4 - half:+.1f} to {4 + half:+.1f}"
    assert mean_interval(gains[:2]) == ""


def test_a_failing_run_names_its_log(tmp_path: Path):
    file = tmp_path / "broken.yaml"
    arms = {"missing": ["model.path=nowhere", "run.phases=[online]"]}
    file.write_text(yaml.safe_dump({"recipe": str(RECIPES / "sort.yaml"), "seeds": [0], "arms": arms}))
    with pytest.raises(RecipeError, match=r"run missing/seed0 failed .*seed0\.log"):
        run_experiment(file, tmp_path / "out")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"recipe": "a.yaml", "seeds": [0], "arms": {}}, "needs seeds and arms"),
        ({"recipe": "a.yaml", "seeds": [0], "arms": {"base": []}}, "no arm may be called 'base'"),
        ({"recipe": "a.yaml", "sedes": [0], "arms": {"a": []}}, "sedes"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: dict, message: str):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load_experiment(file)
