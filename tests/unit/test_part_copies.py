"""A copy of any part under a dotted path behaves like the original: nothing in the project decides by the name of a part."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rewards import load_grader
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.health import health_metrics
from rlhub.config.recipe import load_recipe, validate
from rlhub.config.schema import AlgorithmConfig, Recipe, SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.inference import Model
from rlhub.models import llada
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.parts import load_part, part_names
from rlhub.planning.plan import make_plan
from rlhub.planning.view import sampler_text
from rlhub.records.metrics import read_metrics, without_clocks
from rlhub.studies.lab import claim_of
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training.run import train
from rlhub.types import NEVER, Batch, Request

PACKAGE = "copied_parts"
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
EVERY = [(folder, name) for folder in (*KEYS, "labs") for name in part_names(folder)]
ROLLOUT = ["algorithm.behavior=rollout", "algorithm.updates=1", "sampler.early_stop='off'"]
REPLAY = ["algorithm.likelihood.name=trajectory", "algorithm.views.name=trajectory", "sampler.name=left_to_right"]
STALE = ["algorithm.max_staleness=1", "sampler.early_stop='off'"]
NO_RATIO = ["algorithm.objective.name=dpo", "algorithm.behavior=none"]
PAIRS = ["run.phases=[pairs]", "pairs.data.path=absent.jsonl", *NO_RATIO]
UNGRADED = ["task.reward.name=none", "roles.generators=0", "roles.reward_workers=0"]
BLOCKS = ["model.family=sdar", "model.config={max_position_embeddings: 64, block_size: 4}"]
# Every part without options, which stay where a recipe names the same part again.
RECIPE = """
run: {name: tiny, steps: 1, phases: [sft, online], eval_every: 1, runtime: local}
task: {eval: {test_size: 16}, eval_rows: 16}
sampler: {length: 4, steps: 4, block_length: 4}
algorithm: {kl: {coefficient: 0.01}, reference: frozen, updates: 2, prompts_per_step: 4, completions_per_prompt: 4}
sft: {steps: 1, batch_size: 8, eval_every: 1}
learner: {backend: torch, micro_batch_tokens: 128}
"""
# Recipes in which something depends on what the part can do.
SCENES: dict[str, list[list[str]]] = {
    "samplers": [[*ROLLOUT, *REPLAY], [*ROLLOUT, "algorithm.likelihood.name=exact", "algorithm.views.name=prefix"], [*STALE, *REPLAY]],
    "advantages": [["algorithm.completions_per_prompt=1"], ["task.state_rewards.every=1"], PAIRS],
    "views": [BLOCKS, PAIRS, [*ROLLOUT, *REPLAY], [*STALE, *REPLAY, "algorithm.views.shrink=2"]],
    "likelihoods": [[*ROLLOUT, *REPLAY], [*ROLLOUT, "sampler.name=random"], [*ROLLOUT, *REPLAY, "sampler.early_stop=fill_eos"]],
    "objectives": [
        ["algorithm.reference=none", "algorithm.kl.coefficient=0"],
        ["algorithm.behavior=none"],
        [*STALE, *REPLAY],
        ["roles.scorers=0", "algorithm.kl.coefficient=0"],
    ],
    "tasks": [["run.phases=[sft]", *UNGRADED], ["run.phases=[pairs]", *NO_RATIO, *UNGRADED], UNGRADED],
    "models": [],
    "rewards": [],
    "transports": [["run.runtime=ray"], ["run.runtime=ray", "roles.gpus_per_learner=1", "roles.gpus_per_generator=1"]],
}


@pytest.fixture(scope="module", autouse=True)
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A package of the user's with a copy of every part, and data for the tasks that read some in the current folder."""
    root = tmp_path_factory.mktemp("copies")
    for folder, name in EVERY:
        package = root / PACKAGE / folder
        package.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_bytes(source_of(folder, name).read_bytes())
    for line in range(20):
        with (root / "rows.jsonl").open("a") as file:
            row = {"prompt": f"{line} 1", "answer": f"1 {line}", "chosen": "1 2", "rejected": "2 1", "text": "1 2 3"}
            file.write(json.dumps(row) + "\n")
    (root / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(root)
        yield
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def source_of(folder: str, name: str) -> Path:
    package = {"rewards": "rewards", "transports": "workers/transports", "labs": "rlhub/studies/labs"}.get(folder, f"rlhub/{folder}")
    return Path(__file__).resolve().parents[2] / package / f"{name}.py"


def copy_of(folder: str, name: str) -> str:
    return f"{PACKAGE}.{folder}.{name}"


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or what it says in refusing."""
    try:
        return action()
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@cache
def base() -> Recipe:
    return load_recipe("recipe.yaml")


def set_value(recipe: Recipe, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    owner = reduce(lambda owner, part: owner[part] if isinstance(owner, dict) else getattr(owner, part), sections, recipe)
    (owner if isinstance(owner, dict) else vars(owner))[last] = value


def options_of(folder: str, name: str) -> dict[str, Any]:
    """Values by key that a recipe needs beside the name."""
    if folder == "models":
        return {"model.config": load_part("models", name).TINY}
    if folder != "tasks":
        return {}
    known = load_part("tasks", name).Config.__dataclass_fields__
    data = {"path": "rows.jsonl", "vocabulary": 256} if "path" in known and known["path"].default == "" else {}
    size = {"test_size": 16} if "test_size" in known else {}
    return {"task.train": {key: value for key, value in data.items() if key in known}, "task.eval": size}


def said(folder: str, name: str, used: str, scene: list[str]) -> str:
    """The plan of a recipe with this part, or why it is refused; without the names of copies."""
    recipe = deepcopy(base())
    for key, _, value in (text.partition("=") for text in scene):
        set_value(recipe, key, yaml.safe_load(value))
    for key, value in {KEYS[folder]: used, **options_of(folder, name)}.items():
        set_value(recipe, key, value)

    def plan() -> str:
        validate(recipe)
        return json.dumps(make_plan(recipe).to_dict(), default=str) + sampler_text(recipe.sampler)

    return str(outcome(plan)).replace(f"{PACKAGE}.{folder}.", "")


@pytest.mark.parametrize("folder", KEYS)
def test_checks_and_plan_say_the_same_of_a_copy(folder: str) -> None:
    planned = 0
    for name in part_names(folder):
        for scene in ([], *SCENES[folder]):
            of_original = said(folder, name, name, scene)
            assert said(folder, name, copy_of(folder, name), scene) == of_original, (name, scene)
            planned += of_original.startswith("{")
    assert planned >= len(part_names(folder)) / 2, "most recipes are good ones"


@pytest.mark.parametrize(
    ("folder", "name", "scene", "wanted"),
    [
        ("advantages", "z_score", ["algorithm.completions_per_prompt=1"], "z_score compares completions of one prompt"),
        ("advantages", "step_difference", [], "step_difference needs grades of intermediate states"),
        ("views", "full_mask", BLOCKS, "the views full_mask mask all blocks at once"),
        ("views", "trajectory", PAIRS, "trajectory replays a sampler"),
        ("likelihoods", "elbo", [*ROLLOUT, *REPLAY], "the likelihood elbo does not score the rollout's own steps"),
        ("likelihoods", "exact", [*ROLLOUT, "sampler.name=random"], "the likelihood exact is that of left_to_right, not of random"),
        ("views", "trajectory", [*STALE, *REPLAY, "algorithm.views.shrink=2"], "the likelihood trajectory merges steps"),
        ("transports", "nccl", ["run.runtime=ray"], "nccl needs a GPU for each"),
        ("tasks", "documents", ["run.phases=[sft]", *UNGRADED], "packed adaptive into rows"),
    ],
)
def test_what_a_part_states_is_seen_in_its_copy(folder, name, scene, wanted) -> None:
    assert wanted in said(folder, name, copy_of(folder, name), scene)
    if folder == "views" and name == "full_mask":
        assert "mask all blocks at once" not in said(folder, "elbo", copy_of(folder, "elbo"), scene)


@pytest.mark.parametrize(("folder", "name"), EVERY)
def test_a_copy_states_all_that_its_original_does(folder: str, name: str) -> None:
    modules = [load_part(folder, used) for used in (name, copy_of(folder, name))]
    stated = [{key: value for key, value in vars(module).items() if key.isupper() and _is_plain(value)} for module in modules]
    assert stated[0] == stated[1]
    if "Config" in vars(modules[0]):
        fields = [[(field.name, str(field.type)) for field in dataclasses.fields(module.Config)] for module in modules]
        assert fields[0] == fields[1]
    if folder == "labs":
        assert claim_of(modules[0]) == claim_of(modules[1])


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | tuple | list) and not inspect.isclass(value)


# ------------------------------------------------------------------------------------------------------------- one step of each

# Compositions in which a part of some kind can work; each is tried with every part in turn.
COMPOSITIONS = [
    {"advantage": "group_mean", "views": "elbo", "likelihood": "elbo", "objective": "sequence_clip"},
    {"advantage": "best_worst", "views": "coupled", "likelihood": "elbo", "objective": "dpo"},
    {"advantage": "group_mean", "views": "trajectory", "likelihood": "trajectory", "objective": "token_clip"},
]
STEPS, LENGTH = 4, 4
PROFILE = Profile(mask_id=0, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="")


def one_batch(step_rewards: bool) -> Batch:
    """Two prompts with four completions each; one grade is invalid."""
    draws = np.random.default_rng(0)
    rewards = draws.integers(0, 3, (2, 4)).astype(float)
    rewards[0] = [1.0, 0.0, np.nan, 2.0]
    steps = [draws.permutation(STEPS).astype(np.int16) for _ in range(8)]
    steps[3][1] = NEVER
    return Batch(
        uid=np.arange(8, dtype=np.uint64),
        group=np.repeat(np.arange(2), 4),
        prompts=[draws.integers(2, 9, 1 + sample // 4).astype(np.int32) for sample in range(8)],
        completions=[draws.integers(2, 9, LENGTH).astype(np.int32) for _ in range(8)],
        response_length=np.full(8, LENGTH),
        scored_length=np.full(8, LENGTH),
        rewards=rewards,
        member=np.tile(np.arange(4), 2),
        unmask_step=steps,
        block_length=LENGTH,
        step_rewards=draws.integers(0, 3, (2, 4, STEPS)).astype(float) if step_rewards else None,
    )


def one_step(parts: dict[str, str]) -> tuple[torch.Tensor, dict[str, float], dict[str, float]]:
    """Derivatives of the loss with respect to random token log-probs, metrics, and statistics of the estimates."""
    algorithm = Algorithm.compose(AlgorithmConfig(**{key: {"name": name} for key, name in parts.items()}, reference="frozen"))
    batch = one_batch("STEP_REWARDS" in vars(algorithm.advantage[0]))
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, PROFILE)
    policy, proximal, reference = (-torch.rand(3, len(views.score_row), generator=torch.Generator().manual_seed(1)) * 3).unbind()
    gradient, scores, metrics = algorithm.coefficients(LogProbs(policy, proximal, reference), views, batch, credit)
    return gradient, metrics, health_metrics(algorithm, scores, credit, batch)


@pytest.mark.parametrize(
    ("key", "folder", "name"),
    [
        (key, folder, name)
        for key, folder in [("advantage", "advantages"), ("views", "views"), ("likelihood", "likelihoods"), ("objective", "objectives")]
        for name in part_names(folder)
    ],
)
def test_a_step_with_a_copy_is_the_same_to_the_last_bit(key: str, folder: str, name: str) -> None:
    worked = 0
    for parts in COMPOSITIONS:
        chosen = [{**parts, key: used} for used in (name, copy_of(folder, name))]
        original, copied = (outcome(lambda parts=parts: one_step(parts)) for parts in chosen)
        if isinstance(original, str):
            assert copied == original
            continue
        assert torch.equal(original[0], copied[0]) and bool(original[0].isfinite().all())
        assert repr(original[1:]) == repr(copied[1:])  # as text, in which NaN equals itself
        worked += 1
    assert worked, f"no composition suits {name}"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    config = llada.Config.from_published(llada.TINY | {"mask_token_id": 0, "eos_token_id": 1})
    return llada.build(config).initialize(torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("name", part_names("samplers"))
def test_rollouts_of_a_copied_sampler_are_the_same(name: str, network: torch.nn.Module) -> None:
    requests = [Request(uid=uid, group_uid=0, prompt_ids=np.array([3, 4 + uid], dtype=np.int32)) for uid in range(2)]
    made = []
    for used in (name, copy_of("samplers", name)):
        settings = SamplerConfig(name=used, length=LENGTH, steps=STEPS, block_length=LENGTH)
        made.append(Engine(network, "cpu").generate(requests, settings, Noise(0)))
    for original, copied in zip(*made, strict=True):
        assert dataclasses.asdict(copied)["sampler"].pop("name") == copy_of("samplers", name)
        assert repr(dataclasses.replace(original, sampler={})) == repr(dataclasses.replace(copied, sampler={}))


@pytest.mark.parametrize("name", part_names("models"))
def test_a_copied_family_computes_the_same(name: str) -> None:
    logits = []
    for used in (name, copy_of("models", name)):
        family = load_part("models", used)
        model = family.build(family.Config.from_published(family.TINY)).initialize(torch.Generator().manual_seed(0)).eval()
        logits.append(Model(model, Path()).logits([[2, 3, 4, model.mask_id]]))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", part_names("tasks"))
def test_a_copied_task_has_the_same_examples(name: str) -> None:
    train_options = options_of("tasks", name)["task.train"]
    tasks = [load_task(used, train_options, "train", seed=0) for used in (name, copy_of("tasks", name))]
    assert repr([tasks[0].example(index) for index in range(3)]) == repr([tasks[1].example(index) for index in range(3)])
    sizes = [made and len(made) for made in (task_tokenizer(used, train_options) for used in (name, copy_of("tasks", name)))]
    assert sizes[0] == sizes[1] and tasks[0].description == tasks[1].description


@pytest.mark.parametrize("name", part_names("rewards"))
def test_a_copied_reward_gives_the_same_grade(name: str) -> None:
    row = {"answer": "1 2", "target": 3, "numbers": [1, 2], "puzzle": "1", "solution": "1"}

    def grade(used: str) -> str:
        options = {"format_tags": {}, "regex": {"pattern": "1"}}.get(name, {})
        return repr(load_grader({"name": used, **options})("p", "<answer>1 2</answer>", row))

    original, copied = (str(outcome(lambda used=used: grade(used))) for used in (name, copy_of("rewards", name)))
    assert copied.replace(f"{PACKAGE}.rewards.", "") == original


def test_a_run_of_copies_alone_is_the_same_run(tmp_path: Path) -> None:
    names = {
        "tasks": "sort",
        "models": "llada",
        "samplers": "low_confidence",
        "advantages": "group_mean",
        "views": "coupled",
        "likelihoods": "elbo",
        "objectives": "sequence_clip",
        "rewards": "exact_match",
    }
    shape = "model.config={d_model: 32, n_layers: 2, n_heads: 2, mlp_hidden_size: 64, max_sequence_length: 32}"
    rows, weights = [], []
    for number, used in enumerate((lambda folder: names[folder], lambda folder: copy_of(folder, names[folder]))):
        chosen = [f"{KEYS[folder]}={used(folder)}" for folder in names]
        small = ["task.train={digits: 4}", "task.eval={test_size: 16}", "algorithm.views.draws=2", shape]
        recipe = load_recipe("recipe.yaml", [*chosen, *small, f"run.output_dir={tmp_path / str(number)}"])
        run = train(recipe, Console(file=io.StringIO()))
        rows.append([without_clocks(row) for row in read_metrics(run / "metrics.jsonl")])
        weights.append(load_file(run / "checkpoints" / "step_00001" / "hf" / "model.safetensors"))
    assert rows[0] == rows[1] and "kl" in rows[0][-1] and "eval/accuracy" in rows[0][-1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
