"""An experiment from its file to its table, on a recipe cut to seconds."""

import json
from pathlib import Path

import pytest
import yaml

from rlhub.errors import RecipeError
from rlhub.experiment import load_experiment, run_experiment
from rlhub.recipe import load_recipe

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
