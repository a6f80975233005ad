"""Loading recipes: merging, typing, errors with their place, and the way back to YAML."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from rlhub.config.checks import check_devices
from rlhub.config.recipe import dump_recipe, load_recipe, validate
from rlhub.config.schema import Recipe
from rlhub.errors import RecipeError
from rlhub.parts import KeyedError, load_part, part_config, part_names

RECIPES = Path(__file__).parents[2] / "recipes"
VIEWS = """
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True)
class Config:
    draws: int = 1
    law: Literal["flat", "steep"] = "flat"
    widths: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")

def make(batch, credit, config, noise, update, profile): ...
def rows_per_sample(config, steps): ...
"""
LOCAL = "run: {runtime: local}\nlearner: {backend: torch}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into an empty working directory; returns the first one's name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "recipe.yaml", **others: str) -> str:
        for file, content in {name: text, **{f"{stem}.yaml": content for stem, content in others.items()}}.items():
            Path(file).write_text(content)
        return name

    return write


@pytest.fixture
def my_parts(tmp_path, monkeypatch):
    """A package of the user's with parts, and one that fails on import."""
    package = tmp_path / "my_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "views.py").write_text(VIEWS)
    (package / "broken.py").write_text("1 / 0\n")
    (package / "bare.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_parts"
    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        del sys.modules[name]


def message(path: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "path", sorted(p for p in RECIPES.rglob("*.yaml") if p.parent.name not in ("experiments", "labs")), ids=lambda path: path.stem
)
def test_every_shipped_file_loads_and_comes_back_equal(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_an_empty_file_is_the_default_recipe(write):
    assert load_recipe(write("# nothing\n")) == Recipe()


def test_the_recipe_is_typed(write):
    recipe = load_recipe(write(LOCAL), ["learner.optimizer.learning_rate=3e-6", "learner.optimizer.betas=[0, 1e-1]", "run.name=5"])
    assert recipe.learner.optimizer.learning_rate == 3e-6
    assert recipe.learner.optimizer.betas == (0.0, 0.1)
    assert recipe.run.name == "5"


def test_later_layers_win(write):
    path = write("extends: [one.yaml, two.yaml]\nrun: {seed: 3}\n", one="run: {steps: 1, seed: 1, name: one}", two="run: {steps: 2}")
    recipe = load_recipe(path, ["run.seed=4"])
    assert (recipe.run.name, recipe.run.steps, recipe.run.seed) == ("one", 2, 4)


def test_extends_is_relative_to_its_file_and_recursive(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("run: {steps: 7}", "sub/deep.yaml", **{"sub/mid": "extends: deep.yaml\n"})
    assert load_recipe(write("extends: sub/mid.yaml")).run.steps == 7


def test_a_shared_base_does_not_undo_what_came_between(write):
    path = write(
        "extends: [one.yaml, two.yaml]", base="run: {steps: 1}", one="extends: base.yaml\nrun: {steps: 2}", two="extends: base.yaml"
    )
    assert load_recipe(path).run.steps == 2


def test_a_variant_of_a_base_keeps_what_the_recipe_tuned(write):
    path = write(
        "extends: [tuned.yaml, variant.yaml]",
        base="run: {steps: 1, seed: 1}",
        tuned="extends: base.yaml\nrun: {steps: 2}",
        variant="extends: base.yaml\nrun: {seed: 3}",
    )
    recipe = load_recipe(path)
    assert (recipe.run.steps, recipe.run.seed) == (2, 3)


def test_a_file_that_could_not_take_effect_is_refused(write):
    path = write("extends: [one.yaml, base.yaml]", base="run: {steps: 1}", one="extends: base.yaml\nrun: {steps: 2}")
    assert "recipe.yaml:1: extends: 'base.yaml' was merged by a file before it" in message(path)


def test_another_part_drops_the_options_of_the_earlier_one(write):
    base = "algorithm:\n  views: {name: full_mask, prompt_mask: 0.5, draws: 3}\n"
    path = write("extends: base.yaml\nalgorithm: {views: {name: elbo, draws: 4}}\n", base=base)
    assert load_recipe(path).algorithm.views == {"name": "elbo", "draws": 4}
    assert load_recipe("base.yaml", ["algorithm.views.draws=5"]).algorithm.views == {"name": "full_mask", "prompt_mask": 0.5, "draws": 5}


def test_order_of_overrides_does_not_matter_for_a_new_part(write):
    path = write("algorithm: {views: {name: full_mask, prompt_mask: 0.5}}\n")
    for overrides in (["algorithm.views.name=elbo", "algorithm.views.draws=4"], ["algorithm.views.draws=4", "algorithm.views.name=elbo"]):
        assert load_recipe(path, overrides).algorithm.views == {"name": "elbo", "draws": 4}


def test_an_empty_mapping_takes_nothing_away(write):
    path = write("task: {train: {digits: 4}}\nrun: {}\nalgorithm: {views: {}}\n")
    recipe = load_recipe(path, ["task.train={}", "run={}"])
    assert (recipe.task.train, recipe.run, recipe.algorithm.views) == ({"digits": 4}, Recipe().run, {"name": "coupled"})


def test_another_task_drops_the_options_of_the_earlier_one(write):
    recipe = load_recipe(write("task: {name: sort, train: {digits: 4}, eval: {digits: 5}}"), ["task.name=countdown"])
    assert (recipe.task.train, recipe.task.eval) == ({}, {})


def test_another_checkpoint_drops_the_shape_of_the_earlier_one(write):
    path = write("extends: base.yaml", base="model: {config: {d_model: 64}}")
    assert load_recipe(path, ["model.path=."]).model.config == {}
    assert "no folder 'nowhere'" in message(path, "model.path=nowhere")


@pytest.mark.parametrize("word", ["off", "no", "on", "2020-01-01", "1e3", "010", "true", "null", "a: b", "1_000", "é"])
def test_text_survives_saving(word, tmp_path):
    recipe = Recipe(about=word)
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "config.yaml").about == word


def test_off_is_text(write):
    assert load_recipe(write("sampler:\n  early_stop: off\n")).sampler.early_stop == "off"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("run:\n  stps: 3\n", ["recipe.yaml:2", "run.stps", "steps"]),
        ("\nlerner: {backend: torch}\n", ["recipe.yaml:2", "lerner", "learner"]),
        ("learner:\n  optimizer:\n    lr_rate: 1\n    learning_rat: 1\n", ["recipe.yaml:3", "lr_rate"]),
        ("run:\n  steps: many\n", ["recipe.yaml:2", "run.steps", "a whole number", "'many'"]),
        ("run:\n", ["recipe.yaml:1", "run", "a mapping", "null"]),
        ("run: 3\n", ["recipe.yaml:1", "a mapping", "3"]),
        ("task: 3\n", ["recipe.yaml:1", "task", "a mapping", "3"]),
        ("run:\n  deterministic: true\n", ["recipe.yaml:2", "run.deterministic", "was removed"]),
        ("run: {steps: {a: 1}}\n", ["recipe.yaml:1", "run.steps", "a whole number"]),
        ("run: {resume: perhaps}\n", ["run.resume", "true or false", "'perhaps'"]),
        ("learner: {optimizer: {betas: [0.9]}}\n", ["betas", "a list of 2 items", "[0.9]"]),
        ("algorithm:\n  views: coupled\n", ["recipe.yaml:2", "algorithm.views", "a mapping", "'coupled'"]),
        ("algorithm:\n  views: {name: coupled, drws: 2}\n", ["recipe.yaml:2", "algorithm.views.drws", "draws"]),
        ("algorithm:\n  views: {name: cupled}\n", ["recipe.yaml:2", "'cupled'", "coupled"]),
        ("algorithm:\n  views: {name: null}\n", ["recipe.yaml:2", "null", "coupled"]),
        ("task:\n  train: {digts: 3}\n", ["recipe.yaml:2", "task.train.digts", "digits"]),
        ("task:\n  eval: {digits: x}\n", ["recipe.yaml:2", "task.eval.digits", "a whole number", "'x'"]),
        ("model:\n  config: {d_modl: 3}\n", ["recipe.yaml:2", "d_modl", "d_model"]),
        ("run: {steps: 1}\nrun: {seed: 1}\n", ["recipe.yaml:2", "run", "twice", "recipe.yaml:1"]),
        ("run: {steps: 1\nmodel: 3\n", ["recipe.yaml:2", "not valid YAML"]),
        ("- run\n", ["recipe.yaml:1", "mapping"]),
        ("a: &a {b: *a}\n", ["recipe.yaml", "alias"]),
        ("run: !!python/object:os.system {}\n", ["recipe.yaml:1", "not valid YAML"]),
        ("about: ${run.nme}\n", ["recipe.yaml:1", "about", "run.nme"]),
        ("extends: 3\n", ["recipe.yaml:1", "extends", "3"]),
        ("extends:\n  - recipe.yml\n", ["recipe.yaml:1", "'recipe.yml'", "recipe.yaml"]),
        ("extends: recipe.yaml\n", ["recipe.yaml:1", "circle", "recipe.yaml -> recipe.yaml"]),
    ],
)
def test_mistakes_in_a_file_name_their_place(write, text, wanted):
    got = message(write(text))
    for part in wanted:
        assert part in got


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("run.steps", ["'run.steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("run.steps=[1", ["'[1'", "close"]),
        ("run.steps=3.5", ["override 'run.steps=3.5'", "a whole number"]),
        ("run.steps=0", ["run.steps", "at least 1", "0"]),
        ("run.steps=", ["run.steps", "a whole number", "null"]),
        ("run.name=a/b", ["run.name", "'a/b'"]),
        ("run.phases=[online, sft]", ["run.phases", "[sft, online]"]),
        ("run.phases=[onlin]", ["'onlin'", "online"]),
        ("run.seed=-1", ["run.seed", "[0, 2^64)", "-1"]),
        ("algorithm.kl.kind=k4", ["'k4'", "k1"]),
        ("algorithm.kl.coefficient=0.1", ["algorithm.kl.coefficient", "algorithm.reference=frozen"]),
        ("algorithm.reference=sync_every", ["'sync_every'", "sync_every:64"]),
        ("algorithm.on_invalid=value", ["'value'", "value:0.0"]),
        ("algorithm.behavior=none", ["algorithm.behavior", "recompute"]),
        ("algorithm.completions_per_prompt=1", ["group_mean", "at least 2"]),
        ("algorithm.max_staleness=1", ["algorithm.correction", "correction=none", "max_staleness=0"]),
        ("algorithm.max_staleness=-1", ["max_staleness", "0 or more"]),
        ("weights.in_flight=true", ["weights.in_flight", "max_staleness"]),
        ("algorithm.correction_cap=0", ["correction_cap", "above 0"]),
        ("sampler.length=12", ["12", "block_length", "8 or 16", "6 or 12"]),
        ("sampler.steps=9", ["9", "at most 8"]),
        ("sampler={block_length: 2, steps: 6}", ["6", "4 blocks", "4 or 8"]),
        ("sampler.early_stop=false", ["early_stop", "choice false", "fill_eos"]),
        ("learner.backend=torch roles.learners=2", ["torch", "deepspeed"]),
        ("learner.micro_batch_tokens=4", ["4", "at least 8"]),
        ("learner.optimizer.betas=[0.9, 1.0]", ["betas", "[0, 1)"]),
        ("learner.optimizer.learning_rate=.nan", ["learning_rate", "above 0", "nan"]),
        ("learner.optimizer.schedule=cos", ["'cos'", "cosine"]),
        ("learner.optimizer.betas.0=0.5", ["betas", "a list of 2 items"]),
        ("roles.learners=1000 learner.backend=deepspeed", ["1000", "at most 128"]),
        ("run.runtime=local roles.learners=2", ["local", "run.runtime=ray"]),
        ("algorithm.reference=frozen algorithm.kl.coefficient=1 roles.scorers=0", ["roles.scorers", "at least 1"]),
        ("weights.transport=nccl", ["nccl", "gloo"]),
        ("run.trackers=[tensorbord]", ["'tensorbord'", "tensorboard"]),
        ("weights.transport=object_stor", ["'object_stor'", "object_store"]),
        ("model.path=no/such/model", ["'no/such/model'", "model.path"]),
        ("eval_temperatures=[]", ["eval_temperatures", "a non-empty list", "[]"]),
        ("eval_temperatures=[0.5, -1]", ["eval_temperatures", "each a number (0 or more)", "[0.5, -1]"]),
        ("run.steps=true", ["run.steps", "a whole number", "true"]),
        ("run.deterministic=true", ["override 'run.deterministic=true'", "was removed", "every run is deterministic", "delete"]),
        ("algorithm.reference=frozn", ["'frozn'", "did you mean frozen?"]),
        ("algorithm.reference=sync_every:0", ["'sync_every:0'", "none, frozen, adapter_off or sync_every:N"]),
        ("sampler.guidance_interval=[0.5, 0.5]", ["two shares that ascend", "[0.5, 0.5]"]),
        ("sft.mask_range=[0.3, 0.8, 0.9]", ["two shares that ascend", "0.9"]),
        ("sampler.records=[entropie]", ["'entropie'", "did you mean entropy?"]),
        ("learner.zero_stage=4", ["zero_stage", "4", "[0, 3]"]),
        ("model.rope.target_length=0", ["target_length", "a whole number (at least 1) or null", "0"]),
        ("model.router.replay=true", ["model.router.replay", "algorithm.updates=1"]),
        ("task.train.correct_fraction=2", ["override 'task.train.correct_fraction=2'", "[0, 1]"]),
        ("task.reward.name=grader.py:f", ["grader.py", "not found"]),
        ("algorithm.objective.name=no.such.module", ["'no'", "sequence_clip"]),
    ],
)
def test_mistakes_in_overrides_say_what_would_be_right(write, override, wanted):
    overrides = [override] if "[" in override or "{" in override else override.split()
    got = message(write("run: {steps: 5}\n"), *overrides)
    for part in wanted:
        assert part in got


def test_parts_of_the_user_by_dotted_path(write, my_parts):
    path = write(f"algorithm: {{views: {{name: {my_parts}.views, draws: 3, widths: [1, 2]}}}}\n")
    recipe = load_recipe(path)
    config = part_config(load_part("views", recipe.algorithm.views["name"]), recipe.algorithm.views)
    assert (config.draws, config.law, config.widths) == (3, "flat", (1.0, 2.0))
    assert "one of flat, steep" in message(path, "algorithm.views.law=flt")
    assert "override 'algorithm.views.draws=0'" in message(path, "algorithm.views.draws=0")
    assert "ZeroDivisionError" in message(path, f"algorithm.views.name={my_parts}.broken")
    assert "no dataclass Config" in message(path, f"algorithm.views.name={my_parts}.bare")
    assert f"'{my_parts}.veiws'" in message(path, f"algorithm.views.name={my_parts}.veiws")


def test_errors_can_be_sent_between_processes():
    error = pickle.loads(pickle.dumps(KeyedError("expected a number", "run.steps")))
    assert (str(error), error.key) == ("run.steps: expected a number", "run.steps")


def test_part_names_come_from_the_files():
    assert {"coupled", "elbo", "full_mask"} <= set(part_names("views"))


def test_a_recipe_made_in_python_is_checked():
    recipe = Recipe()
    recipe.run.steps = 0
    with pytest.raises(RecipeError, match=r"^run\.steps: must be at least 1, got 0$"):
        validate(recipe)


def test_devices_are_checked_against_the_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = Recipe()
    check_devices(recipe)
    recipe.roles.gpus_per_learner = 1
    with pytest.raises(RecipeError, match=r"roles\.gpus_per_learner: asks for 1 GPUs .* set roles\.gpus_per_learner=0"):
        check_devices(recipe)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_devices(recipe)
