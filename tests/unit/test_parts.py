"""Parts of the user's: files and modules beside the recipe, what is said of those that are none, and names that hide ours."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import silent

import rlhub
from rewards import load_grader
from rewards.pool.pool import RewardPool
from rewards.pool.settings import RewardPoolConfig
from rlhub.algorithm.compose import Algorithm
from rlhub.config.recipe import dump_recipe, load_recipe
from rlhub.config.schema import AlgorithmConfig
from rlhub.errors import RecipeError
from rlhub.parts import load_part, part_config, part_names
from rlhub.training.run import train
from rlhub.types import Batch

CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    scale: float = 1.0
"""
# A part of each kind, as short as its contract allows.
PARTS = {
    "samplers": """
from rlhub.samplers import transfer_schedule
RECORDS, LOG_PROBS = (), "none"
def schedule(canvas_length, steps, block_length, config): return transfer_schedule(canvas_length, steps, block_length)
def choose(state, schedule, uniforms, config, deferred=None): ...
""",
    "advantages": "def assign(rewards, batch, config): ...",
    "views": "def make(batch, credit, config, noise, update, profile): ...\ndef rows_per_sample(config, steps): return 1",
    "likelihoods": "def estimate(log_prob, views, credit, config): ...",
    "objectives": "def loss(scores, credit, config): ...",
    "tasks": "def build(config, split, seed): ...",
    "models": "ARCHITECTURES = ()\ndef build(config): ...",
    "rewards": "def grade(prompt, completion, row, config): ...",
    "transports": """
class Transport:
    def __init__(self, runtime, learners, config): ...
    def push(self, receivers, version, concurrent=False): ...
    def refresh(self, receiver, version, concurrent=False): ...
    def close(self): ...
""",
}
KEYS = {
    "samplers": "sampler.name",
    "advantages": "algorithm.advantage.name",
    "views": "algorithm.views.name",
    "likelihoods": "algorithm.likelihood.name",
    "objectives": "algorithm.objective.name",
    "tasks": "task.name",
    "models": "model.family",
    "rewards": "task.reward.name",
    "transports": "weights.transport",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a recipe and a part of each kind; the current folder is another one."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for kind, text in PARTS.items():
        (tmp_path / "beside" / f"my_{kind}.py").write_text(CONFIG + text)
    return tmp_path / "beside"


def nested(key: str, value: str) -> str:
    """YAML of one dotted key."""
    *sections, last = key.split(".")
    return "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections)) + f"{'  ' * len(sections)}{last}: {value}\n"


def refusal(*arguments: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value_of(recipe: object, key: str) -> object:
    for name in key.split("."):
        recipe = recipe[name] if isinstance(recipe, dict) else getattr(recipe, name)
    return recipe


@pytest.mark.parametrize("kind", PARTS)
def test_a_file_beside_the_recipe_is_a_part_of_every_kind(folder, kind, tmp_path, monkeypatch):
    recipe_file, file = folder / "recipe.yaml", folder / f"my_{kind}.py"
    recipe_file.write_text(nested(KEYS[kind], f"./my_{kind}.py"))
    recipe = load_recipe(recipe_file)
    assert value_of(recipe, KEYS[kind]) == str(file)
    (tmp_path / "config.yaml").write_text(dump_recipe(recipe))  # as a run folder has it
    monkeypatch.chdir(tmp_path)
    assert load_recipe(tmp_path / "config.yaml") == recipe
    monkeypatch.chdir(folder)
    assert value_of(load_recipe(recipe_file, [f"{KEYS[kind]}=my_{kind}.py"]), KEYS[kind]) == str(file)
    assert load_part(kind, str(file)) is load_part(kind, f"./my_{kind}.py")


@pytest.mark.parametrize("kind", PARTS)
def test_what_a_part_lacks_is_said_in_one_line(folder, kind, tmp_path):
    file = folder / "empty.py"
    text = "class Config: ...\n" if kind != "transports" else ""
    file.write_text(text)
    (folder / "recipe.yaml").write_text(nested(KEYS[kind], "./empty.py"))
    got = refusal(folder / "recipe.yaml")
    assert f"recipe.yaml:{KEYS[kind].count('.') + 1}: {KEYS[kind]}: " in got and f"part {file} has no " in got
    assert ("no Transport(runtime, learners, config)" if kind == "transports" else "no dataclass Config") in got
    package = {"rewards": "rewards", "transports": "workers/transports"}.get(kind, f"rlhub/{kind}")
    assert got.endswith(f"see {package}/__init__.py")
    if kind != "transports":
        file.write_text(CONFIG)  # in the same second, with the same name
        assert f"rlhub.{kind} part".removeprefix("rlhub." if kind == "rewards" else "") in (again := refusal(folder / "recipe.yaml"))
        assert "dataclass" not in again and ("(" in again or "ARCHITECTURES" in again)


@pytest.mark.parametrize("kind", PARTS)
def test_contracts_ask_for_what_shipped_parts_have(kind):
    for name in part_names(kind):
        load_part(kind, name)


def test_signatures_in_contracts_are_those_of_shipped_parts():
    """So that the message which quotes one is right."""
    import importlib
    import inspect

    for kind in ("samplers", "advantages", "views", "likelihoods", "objectives", "tasks", "rewards"):
        package = importlib.import_module("rewards" if kind == "rewards" else f"rlhub.{kind}")
        wanted = [choice for entry in package.CONTRACT for choice in ([entry] if isinstance(entry, str) else entry) if "(" in choice]
        for name, text in ((name, text) for name in part_names(kind) for text in wanted):
            function = vars(load_part(kind, name)).get(text.partition("(")[0])
            if function is not None:
                assert f"{text.partition('(')[0]}({', '.join(inspect.signature(function).parameters)})" == text, name


def test_rewards_in_lists_and_auxiliary_terms_may_be_files(folder):
    parts = "[{reward: {name: ./my_rewards.py}, label: own}, {reward: {name: exact_match}}]"
    term = "{name: ./my_objectives.py, weight: 0.5, scale: 2}"
    (folder / "recipe.yaml").write_text(f"algorithm: {{auxiliary: [{term}]}}\ntask: {{reward: {{name: combine, parts: {parts}}}}}\n")
    recipe = load_recipe(folder / "recipe.yaml")
    assert recipe.algorithm.auxiliary[0]["name"] == str(folder / "my_objectives.py")
    assert recipe.task.reward["parts"][0]["reward"]["name"] == str(folder / "my_rewards.py")
    assert Algorithm.compose(recipe.algorithm).auxiliary[0].objective[1].scale == 2.0


def test_a_module_at_top_level_where_no_part_has_its_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "coupled.py").write_text("raise RuntimeError")
    (folder / "recipe.yaml").write_text("algorithm: {views: {name: coupled}, advantage: {name: my_advantages, scale: 3}}")
    recipe = load_recipe(folder / "recipe.yaml")
    assert load_part("advantages", recipe.algorithm.advantage["name"]).__file__ == str(folder / "my_advantages.py")
    got = refusal(folder / "recipe.yaml", ["algorithm.views.name=cuopled"])
    assert "did you mean coupled" in got and "dotted path" in got and "./my_part.py" in got
    assert "did you mean" not in refusal(folder / "recipe.yaml", ["algorithm.views.name=json"]), "Python's own modules are none"
    assert "has no make(" in refusal(folder / "recipe.yaml", ["algorithm.views.name=my_objectives"])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1 / 0\n", "failed: ZeroDivisionError: division by zero"),
        ("def\n", "failed: SyntaxError: invalid syntax (my_views.py, line 1)"),
        ("import no_such_package\n", "failed: ModuleNotFoundError: No module named 'no_such_package'"),
        (None, "file not found: {folder}/my_views.py; did you mean my_rewards.py?"),
    ],
)
def test_a_file_that_fails_on_import_says_why(folder, text, wanted):
    (folder / "my_views.py").unlink()
    if text is not None:
        (folder / "my_views.py").write_text(text)
    (folder / "recipe.yaml").write_text("algorithm: {views: {name: my_views.py}}")
    assert wanted.format(folder=folder) in refusal(folder / "recipe.yaml")


def test_a_config_that_cannot_be_read_from_yaml(folder):
    (folder / "my_objectives.py").write_text(
        "class Thing: ...\n" + CONFIG.replace("1.0", "1.0\n    thing: Thing = Thing()") + PARTS["objectives"]
    )
    (folder / "recipe.yaml").write_text("algorithm: {objective: {name: ./my_objectives.py}}")
    assert "the Config of " in refusal(folder / "recipe.yaml") and "thing" in refusal(folder / "recipe.yaml")


def test_a_file_is_loaded_once_and_anew_when_it_has_changed(folder):
    file = folder / "my_views.py"
    before = load_part("views", str(file))
    assert load_part("views", str(file)) is before
    stamp = file.stat().st_mtime_ns
    file.write_text(file.read_text().replace("1.0", "2.0"))  # as long as before
    os.utime(file, ns=(stamp + 1, stamp + 1))
    after = load_part("views", str(file))
    assert (before.Config().scale, after.Config().scale) == (1.0, 2.0)


def test_options_of_a_file_travel_to_another_process(folder):
    config = part_config(load_part("views", str(folder / "my_views.py")), {"scale": 4})
    assert pickle.loads(pickle.dumps(config)) == config
    program = "import sys, pickle, rlhub.parts; print(pickle.loads(sys.stdin.buffer.read()).scale)"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(config), capture_output=True, check=True, env=environment())
    assert done.stdout == b"4.0\n"
    assert not (folder / "__pycache__").exists(), "nothing is left beside the recipe"


WRONG = {
    "advantages": ("assign must return Credit, got None", lambda algorithm: algorithm.credit(batch())),
    "views": ("make must return Views, got None", lambda algorithm: algorithm.make_views(batch(), None, noise(), 0, None)),
    "likelihoods": ("estimate must return LogLikelihood, got None", lambda algorithm: algorithm.estimate(zeros(), None, None)),
    "objectives": ("loss must return (scalar Tensor, dict), got None", lambda algorithm: algorithm.loss(None, None)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_return_names_the_part(folder, kind):
    file, (wanted, call) = folder / f"my_{kind}.py", WRONG[kind]
    config = AlgorithmConfig(**{KEYS[kind].split(".")[1]: {"name": str(file)}})
    with pytest.raises(RecipeError) as caught:
        call(Algorithm.compose(config))
    assert str(caught.value).startswith(f"{file}: {wanted}")


@pytest.mark.parametrize(
    ("returned", "got"), [("1.0, {}", "(float, dict)"), ("torch.zeros(2), {}", "a tensor of shape [2]"), ("torch.zeros(()),", "(Tensor)")]
)
def test_an_objective_returns_a_scalar_and_metrics(folder, returned, got):
    (folder / "my_objectives.py").write_text(f"import torch\n{CONFIG}def loss(scores, credit, config): return {returned}\n")
    algorithm = Algorithm.compose(AlgorithmConfig(objective={"name": str(folder / "my_objectives.py")}))
    with pytest.raises(RecipeError, match=r"loss must return \(scalar Tensor, dict\), got ") as caught:
        algorithm.loss(None, None)
    assert f"got {got};" in str(caught.value)


def batch() -> Batch:
    import numpy as np

    one = np.zeros(1, dtype=np.int64)
    return Batch(one.astype(np.uint64), one, [one], [one], one + 1, one + 1, np.zeros((1, 1)), one, 0)


def noise():
    from rlhub.noise import Noise

    return Noise(0)


def zeros():
    import torch

    return torch.zeros(3)


# ------------------------------------------------------------------------------------------------------ names that hide ours

GRADE = """
from rlhub.types import RewardResult
def grade(prompt, completion, row, config): return RewardResult(float(len(completion)) * config.scale)
"""


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds this checkout, whether it is installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, **more}


@pytest.fixture
def shadows(tmp_path, monkeypatch) -> Path:
    """A current folder with modules of the user's that have the names of our packages, and a recipe that names one."""
    for name in ("rewards", "workers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is not the package')\n")
    (tmp_path / "my_reward.py").write_text(CONFIG + GRADE)
    (tmp_path / "recipe.yaml").write_text("task: {reward: {name: my_reward}}\nmodel: {config: {d_model: 32, n_layers: 1, n_heads: 2}}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CONSOLE = "import sys; from rlhub.commands.main import main; sys.argv[0] = 'rlhub'; main()"


@pytest.mark.parametrize("start", [["-m", "rlhub"], ["-P", "-c", CONSOLE]], ids=["module", "console"])
def test_modules_of_the_users_hide_no_package_of_ours(shadows, start):
    if start[0] != "-m":  # there Python itself takes the first `rlhub` of the current folder
        (shadows / "rlhub.py").write_text("raise RuntimeError('this is not the package')\n")
    done = subprocess.run([sys.executable, *start, "plan", "recipe.yaml", "--json"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_grading_processes_find_our_packages(shadows, monkeypatch):
    (shadows / "rlhub.py").write_text("raise RuntimeError('this is not the package')\n")
    monkeypatch.setattr(sys, "path", ["", str(shadows), *sys.path])
    with RewardPool({"name": f"{shadows}/my_reward.py", "scale": 2.0}, RewardPoolConfig(processes=1)) as pool:
        assert [result.value for result in pool.grade([("", "four", {})])] == [8.0]
    assert load_grader({"name": "my_reward"})("", "four", {}).value == 4.0


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ('NEEDS = ("toplogp",)', "NEEDS of .*my_sampler.py must be a tuple of .*top_logp.*got"),
        ('NEEDS = "top_logp"', "must be a tuple of"),
        ('RECORDS = ("ordr",)', "RECORDS of .* must be a tuple of .*order"),
        ('LOG_PROBS = "exakt"', "LOG_PROBS of .* must be one of exact, given_order, none, got 'exakt'"),
    ],
)
def test_what_a_sampler_states_must_be_known(tiny, tmp_path, statement, message):
    file = tmp_path / "my_sampler.py"
    body = "from dataclasses import dataclass\nfrom rlhub.samplers.random import choose, schedule\n"
    file.write_text(f"{body}RECORDS = ()\nLOG_PROBS = 'none'\n{statement}\n\n@dataclass(frozen=True)\nclass Config:\n    pass\n")
    with pytest.raises(RecipeError, match=message):
        tiny(f"sampler.name={file}")


def test_what_an_objective_needs_must_be_known(tiny, tmp_path):
    file = tmp_path / "my_objective.py"
    body = "from dataclasses import dataclass\nNEEDS = ('proximl',)\n\ndef loss(scores, credit, config): ...\n"
    file.write_text(f"{body}\n@dataclass(frozen=True)\nclass Config:\n    pass\n")
    with pytest.raises(RecipeError, match=r"NEEDS of .* must be a tuple of proximal and reference, got"):
        tiny(f"algorithm.objective.name={file}")


def test_a_family_in_a_file_is_the_one_that_trains_and_is_loaded(tiny, tmp_path):
    """Also where its ARCHITECTURES are those of a family that ships."""
    file = tmp_path / "family.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom rlhub.models import llada\nARCHITECTURES, TINY = llada.ARCHITECTURES, llada.TINY\n\n"
        "@dataclass(frozen=True)\nclass Config(llada.Config):\n    pass\n\n"
        "def build(config):\n    network = llada.build(config)\n    network.mine = True\n    return network\n"
    )
    run = train(tiny(f"model.family={file}", "run.steps=1", "sft.steps=1", f"run.output_dir={tmp_path}"), silent())
    assert rlhub.load_model(run).network.mine


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("def push", "def send", "has no Transport.push(self, receivers, version, concurrent)"),
        ("def close(self)", "def close(self, hard)", "Transport.close is called with (self), and takes (self, hard)"),
        (
            "receiver, version, concurrent=False",
            "receiver, version",
            "Transport.refresh is called with (self, receiver, version, concurrent), and takes (self, receiver, version)",
        ),
    ],
)
def test_a_transport_without_its_methods_is_refused_when_it_is_loaded(tmp_path: Path, was: str, now: str, said: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(PARTS["transports"].replace(was, now))
    with pytest.raises(RecipeError) as caught:
        load_part("transports", str(file))
    assert said in str(caught.value) and "\n" not in str(caught.value)
