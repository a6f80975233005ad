"""The plan's arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhub.config.recipe import load_recipe
from rlhub.config.schema import SamplerConfig
from rlhub.errors import RecipeError
from rlhub.planning.memory import size_text
from rlhub.planning.plan import make_plan, meta_network
from rlhub.planning.quantities import Plan
from rlhub.planning.view import format_plan, sampler_text

RECIPES = Path(__file__).parents[2] / "recipes"
COMPLETE = sorted(path for path in RECIPES.rglob("*.yaml") if "task" in yaml.safe_load(path.read_text()))
SORT = RECIPES / "sort.yaml"


def plan_of(*overrides: str) -> Plan:
    return make_plan(load_recipe(SORT, overrides))


def rows(plan: Plan) -> dict[str, tuple[int, int, int]]:
    return {entry.kind: (entry.rows, entry.forwards, entry.backwards) for entry in plan.forwards}


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_every_complete_recipe_plans(path):
    plan = make_plan(load_recipe(path))
    assert json.loads(json.dumps(plan.to_dict()))["parameters"] == plan.parameters
    assert plan.recipe.run.name in format_plan(plan)


@pytest.mark.parametrize("name", ["vrpo", "dpo", "ipo", "kto", "simpo"])
def test_every_preference_algorithm_plans_on_pairs(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [{RECIPES}/harmless_pairs.yaml{f', {RECIPES}/algorithms/{name}.yaml' if name != 'vrpo' else ''}]\n")
    plan = make_plan(load_recipe(recipe))
    assert plan.pairs.group_size == (1 if name == "kto" else 2)
    assert ("reference" in rows(plan)) == (name != "simpo")


def test_there_are_complete_recipes():
    assert SORT in COMPLETE


def test_rows_and_forwards_of_a_step():
    plan = plan_of("run.steps=60", "algorithm.updates=4", "algorithm.views.draws=3")
    scored = 16 * 8 * 6  # sequences x draws x two halves
    assert plan.batch.sequences == 128
    assert plan.batch.two_pass  # 768 rows of 16 tokens do not fit into 4096 tokens
    assert plan.batch.micro_batches_per_update == 3
    assert rows(plan) == {
        "sft": (128, 128, 128),
        "rollout": (128 * 8, 128 * 8, 0),
        "policy": (4 * scored, 8 * scored, 4 * scored),
        "proximal": (3 * scored, 3 * scored, 0),  # free at the first update
        "reference": (4 * scored, 4 * scored, 0),
    }
    assert plan.forwards_per_step == 128 * 8 + (8 + 3 + 4) * scored
    assert plan.tokens_per_step == 16 * plan.forwards_per_step
    assert plan.optimizer_steps == {"sft": 1000, "online": 240}


def test_views_kept_over_updates_are_scored_once_by_fixed_policies():
    got = rows(plan_of("algorithm.updates=4", "algorithm.fresh_views=step"))
    assert got["proximal"][0] == 0
    assert got["reference"][0] == 256


def test_no_reference_without_need():
    plan = plan_of("algorithm.kl.coefficient=0", "run.runtime=ray", "learner.backend=deepspeed", "roles.scorers=0")
    assert "reference" not in rows(plan)
    assert [role.role for role in plan.roles] == ["controller", "generator", "learner", "reward worker"]
    assert [memory.role for memory in plan.memory] == ["generator", "learner"]


@pytest.mark.parametrize("detail", ["algorithm.updates=1", "algorithm.behavior=detach"])
def test_no_proximal_without_need(detail):
    assert "proximal" not in rows(plan_of(detail))


def test_uneven_batches_get_suggestions_instead_of_an_error():
    three = ("run.runtime=ray", "learner.backend=deepspeed", "roles.learners=3")
    plan = plan_of(*three)
    assert plan.batch.sequences_per_learner == (42, 43)
    assert any("prompts_per_step 15 or 18" in note for note in plan.notes)
    assert not any("prompts_per_step" in note for note in plan_of(*three, "algorithm.prompts_per_step=15").notes)


def test_placement_and_zero_stages():
    ray = ("run.runtime=ray", "learner.backend=deepspeed", "roles.learners=4", "roles.threads=2", "roles.gpus_per_learner=0.5")
    plans = [plan_of(*ray, f"learner.zero_stage={stage}") for stage in range(4)]
    learner = next(role for role in plans[0].roles if role.role == "learner")
    assert (learner.processes, learner.threads, learner.cpus, learner.gpus) == (4, 2, 8, 2.0)
    bytes_of = [next(memory for memory in plan.memory if memory.role == "learner") for plan in plans]
    weights = 4 * plans[0].parameters
    assert [memory.weights for memory in bytes_of] == [weights, weights, weights, weights // 4]
    assert [memory.gradients for memory in bytes_of] == [weights, weights, weights // 4, weights // 4]
    assert [memory.optimizer for memory in bytes_of] == [2 * weights, weights // 2, weights // 2, weights // 2]


def test_idle_scorers_are_noted():
    assert any("roles.scorers=0" in note for note in plan_of("algorithm.kl.coefficient=0").notes)
    assert not any("roles.scorers=0" in note for note in plan_of().notes)


def test_parameters_are_exact():
    vocabulary = 10 + 4  # digits and special tokens: the task's tokenizer decides
    assert plan_of().parameters == 2 * vocabulary * 128 + 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128)
    llada = load_recipe(RECIPES / "models/llada_8b.yaml")
    network = meta_network(llada.model)
    assert sum(parameter.numel() for parameter in network.parameters()) == 8_015_581_184  # LLaDA-8B


def test_a_checkpoint_is_planned_before_its_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extends = ", ".join(str(RECIPES / name) for name in ("algorithms/espo.yaml", "models/llada_8b.yaml"))
    Path("big.yaml").write_text(f"extends: [{extends}]\ntask: {{name: countdown, reward: {{name: countdown}}}}\n")
    plan = make_plan(load_recipe("big.yaml"))
    assert plan.prompts.estimated
    assert any("download it before training" in note for note in plan.notes)
    learner = next(memory for memory in plan.memory if memory.role == "learner")
    assert learner.optimizer == 12 * plan.parameters // 4  # two moments and a float32 copy over four learners
    assert plan.batch.rows_per_sequence == 4


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["learner.micro_batch_tokens=12"], "12 cannot hold one row of 16 tokens; use at least 16"),
        (["model.config.max_sequence_length=12"], "need 16 positions but the model has 12"),
        (["task={name: countdown, reward: {name: countdown}}"], "needs a checkpoint with a tokenizer"),
    ],
)
def test_model_data_and_sampler_must_fit(overrides, wanted):
    with pytest.raises(RecipeError, match=wanted):
        plan_of(*overrides)


def test_a_small_test_split_is_noted():
    assert any("test split has 20 problems" in note for note in plan_of("task.eval.test_size=20").notes)


def test_text_has_no_trailing_space_and_shows_the_numbers():
    text = format_plan(plan_of())
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "16 x 8 = 128 sequences" in text
    assert "807,552 in float32" in text


def test_sizes_are_readable():
    assert [size_text(size) for size in (0, 512, 3 * 2**20, 2**41)] == ["-", "512 B", "3 MiB", "2 TiB"]


def test_plan_imports_neither_ray_nor_deepspeed():
    code = (
        "import sys; from rlhub.config.recipe import load_recipe; from rlhub.planning.plan import make_plan; "
        f"make_plan(load_recipe({str(SORT)!r})); print({{'ray', 'deepspeed', 'vllm'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RECIPES.parent)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("low_confidence", "log-probs of the rollout are not known"),
        ("random", "exact given the order"),
        ("entropy", "log-probs are exact"),
        ("edit", "records unmask_step, logp, edits"),
    ],
)
def test_the_plan_says_what_log_probs_of_a_sampler_mean(name, words):
    assert words in sampler_text(SamplerConfig(name))
    assert "not known" in sampler_text(SamplerConfig(name, eos="last"))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "low_confidence chooses positions by draws"),
        (["sampler.name=top_probability", "sampler.eos=last"], "sampler.eos last"),
        (["sampler.name=top_probability", "sampler.cache=dual"], "sampler.cache dual"),
        (["sampler.name=top_probability", "sampler.guidance=1"], "guided logits"),
        (["sampler.name=top_probability"], "likelihood elbo does not score"),
    ],
)
def test_recorded_log_probs_must_be_exact(overrides, problem):
    with pytest.raises(RecipeError, match=rf"algorithm\.behavior: rollout needs exact recorded log-probs, but .*{problem}.*use recompute"):
        load_recipe(SORT, ["algorithm.behavior=rollout", *overrides])
