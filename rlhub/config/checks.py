"""What a recipe's types cannot say: names of parts and their options, and keys that must fit each other."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhub.config.schema import Part, Recipe, SamplerConfig
from rlhub.config.tasks import task_kind
from rlhub.config.values import typed_recipe
from rlhub.errors import RecipeError
from rlhub.extras import require
from rlhub.parts import KeyedError, did_you_mean, load_part, one_line, part_config, show

# A part: its folder, the key that names it, and the keys that hold its options. Naming another part drops the options set before.
PARTS = [
    ("models", "model.family", ["model.config"]),
    ("tasks", "task.name", ["task.train", "task.eval"]),
    ("rewards", "task.reward.name", ["task.reward"]),
    ("samplers", "sampler.name", ["sampler.options"]),
    ("advantages", "algorithm.advantage.name", ["algorithm.advantage"]),
    ("views", "algorithm.views.name", ["algorithm.views"]),
    ("likelihoods", "algorithm.likelihood.name", ["algorithm.likelihood"]),
    ("objectives", "algorithm.objective.name", ["algorithm.objective"]),
]


def check_recipe(recipe: Recipe) -> None:
    """Run every check.

    Raises:
        KeyedError: the first problem, with the key that it concerns.
    """
    for check in (
        _check_sampler,
        _check_engine,
        _check_algorithm,
        _check_layout,
        _check_parts,
        _check_recorded_log_probs,
        _check_asynchrony,
        _check_rope,
        _check_router,
        _check_adapters,
        _check_pairs,
    ):
        check(recipe)


def check_sampler(sampler: SamplerConfig) -> None:
    """The checks of a sampler's settings on their own, for calls from Python.

    Raises:
        KeyedError: the first problem; the key begins with `sampler.`.
    """
    try:
        part_config(load_part("samplers", sampler.name), sampler.options)
    except KeyedError as error:
        raise KeyedError(error.message, f"sampler.options.{error.key}".rstrip(".")) from error
    except RecipeError as error:
        raise KeyedError(str(error), "sampler.name") from error
    recipe = Recipe(sampler=sampler)
    typed_recipe(asdict(recipe))
    _check_sampler(recipe)


def check_devices(recipe: Recipe) -> None:
    """Checks that this machine has what training needs: packages, the model's folder and, where roles ask for them, GPUs.

    Raises:
        UserError: something is missing.
    """
    if recipe.roles.engine == "vllm" and "RAY_ADDRESS" not in os.environ:
        from rlhub.vllm_environment import check_vllm

        check_vllm()
    if recipe.run.runtime == "ray":
        require("ray")
    if recipe.learner.backend == "deepspeed" and "RAY_ADDRESS" not in os.environ:
        require("deepspeed", "ray")
    if recipe.model.path and not Path(recipe.model.path).is_dir():
        raise RecipeError(f"model.path: no folder {recipe.model.path!r}; download the checkpoint or set model.path to where it is")
    asking = [key for key in ("generator", "learner", "scorer", "reward_worker") if getattr(recipe.roles, f"gpus_per_{key}") > 0]
    if not asking or "RAY_ADDRESS" in os.environ:  # on a cluster the GPUs may be on other nodes, and Ray does the check
        return
    import torch

    if not torch.cuda.is_available():
        key = f"gpus_per_{asking[0]}"
        raise RecipeError(f"roles.{key}: asks for {getattr(recipe.roles, key):g} GPUs but this machine has none; set roles.{key}=0")


def _check_sampler(recipe: Recipe) -> None:
    sampler = recipe.sampler
    length, block = sampler.length, sampler.block_length
    if length % block:
        lengths = _nearest(length, lambda value: value % block == 0)
        blocks = _nearest(block, lambda value: length % value == 0, highest=length)
        fix = f"use length {lengths}, or block_length {blocks}"
        raise KeyedError(f"{length} is not a multiple of block_length {block}; {fix}", "sampler.length")
    _check_schedule(recipe)
    if sampler.cache == "exact" and sampler.cache_refresh:
        raise KeyedError("refreshes an approximate cache, but sampler.cache is exact; use 0", "sampler.cache_refresh")


def _check_engine(recipe: Recipe) -> None:
    if recipe.roles.engine != "vllm":
        return

    if recipe.run.runtime != "ray":
        raise KeyedError("vllm needs a process of its own, apart from the learner's; use run.runtime: ray", "roles.engine")
    try:
        check_settings(recipe.sampler)
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        raise KeyedError(message, key) from None


def _check_schedule(recipe: Recipe) -> None:
    """The steps, as the sampler's own schedule takes them; a sampler that cannot be loaded is named by another check."""
    from rlhub.samplers import check_statements

    sampler = recipe.sampler
    length, block, steps = sampler.length, sampler.block_length, sampler.steps
    try:
        module = load_part("samplers", sampler.name)
        config = part_config(module, sampler.options)
    except RecipeError:
        return
    try:
        check_statements(module)
    except ValueError as error:
        raise KeyedError(str(error), "sampler.name") from error
    blocks = length // block
    try:
        schedule = module.schedule(length, steps, block, config)
    except ValueError as error:
        if steps % blocks:
            wanted = _nearest(steps, lambda value: value % blocks == 0, highest=length)
            raise KeyedError(
                f"{steps} is not a multiple of the {blocks} blocks (length / block_length); use {wanted}", "sampler.steps"
            ) from error
        raise KeyedError(str(error), "sampler.steps") from error
    if steps > length and not schedule.transfer[-1]:
        raise KeyedError(f"{steps} steps for a canvas of {length} tokens leave some without a token; use at most {length}", "sampler.steps")


def _check_algorithm(recipe: Recipe) -> None:
    algorithm, kl = recipe.algorithm, recipe.algorithm.kl
    advantage = algorithm.advantage.get("name")
    if algorithm.completions_per_prompt < 2 and _stated("advantages", advantage, "GROUP"):
        raise KeyedError(f"{advantage} compares completions of one prompt and needs at least 2, got 1", "algorithm.completions_per_prompt")
    needs_states = _stated("advantages", advantage, "STEP_REWARDS")
    if needs_states and "online" in recipe.run.phases and recipe.task.state_rewards.every == 0:
        raise KeyedError(f"{advantage} needs grades of intermediate states, got 0; use 1 or more", "task.state_rewards.every")
    if kl.coefficient > 0 and getattr(algorithm, kl.against) == "none":
        fix = "algorithm.reference=frozen" if kl.against == "reference" else "algorithm.behavior=recompute"
        key = "algorithm.kl.coefficient"
        raise KeyedError(f"{kl.coefficient:g} needs a policy to compare with, but algorithm.{kl.against} is none; set {fix}", key)


def _check_layout(recipe: Recipe) -> None:
    """Roles that fit the batch, the runtime, the backend and the transport."""
    roles, learner = recipe.roles, recipe.learner
    sequences = recipe.algorithm.prompts_per_step * recipe.algorithm.completions_per_prompt
    for key in ("generators", "reward_workers"):
        count, ungraded = getattr(roles, key), recipe.task.reward.get("name") == "none"
        if ungraded and count:
            raise KeyedError(f"nothing is generated or graded with task.reward.name none, got {count}; use 0", f"roles.{key}")
        if not ungraded and not count:
            raise KeyedError("must be at least 1, got 0; with task.reward.name none it would be 0", f"roles.{key}")
    if recipe.run.runtime == "local" and roles.learners > 1:
        raise KeyedError(f"run.runtime local is one process, got {roles.learners}; use 1, or run.runtime=ray", "roles.learners")
    if learner.backend == "torch" and roles.learners > 1:
        key = "learner.backend"
        raise KeyedError(f"torch is one process, but roles.learners is {roles.learners}; use deepspeed or roles.learners=1", key)
    if roles.learners > sequences:
        raise KeyedError(f"{roles.learners} learners for {sequences} sequences a step; use at most {sequences}", "roles.learners")
    if learner.micro_batch_tokens < recipe.sampler.length:
        raise KeyedError(
            f"{learner.micro_batch_tokens} cannot hold one row: the canvas alone has {recipe.sampler.length} tokens; "
            f"use at least {recipe.sampler.length} plus the longest prompt",
            "learner.micro_batch_tokens",
        )
    way, on_gpus = recipe.weights.transport, roles.gpus_per_learner and roles.gpus_per_generator
    if recipe.run.runtime == "ray" and not on_gpus and _stated("transports", way, "NEEDS_GPUS"):
        raise KeyedError(
            f"{way} needs a GPU for each learner and generator; use gloo or object_store, or set roles.gpus_per_*",
            "weights.transport",
        )


def _check_parts(recipe: Recipe) -> None:
    """Every part exists and takes its options; folders that are named exist."""
    if recipe.run.runtime == "ray":
        try:
            load_part("transports", recipe.weights.transport)
        except RecipeError as error:
            raise KeyedError(str(error), "weights.transport") from error
    if recipe.model.path and not Path(recipe.model.path).is_dir() and not recipe.model.config:
        raise KeyedError(f"no folder {recipe.model.path!r}{_similar_folders(Path(recipe.model.path))}", "model.path")
    values = asdict(recipe)
    for folder, name_key, option_keys in PARTS:
        name = _select(values, name_key)
        options: dict[str, Any] = {}
        if folder == "rewards" and name == "none":
            continue
        if folder == "rewards" and isinstance(name, str) and ":" in name:
            _check_grader_function(recipe.task.reward)
            continue
        try:
            module = load_part(folder, name)
        except RecipeError as error:
            raise KeyedError(str(error), name_key) from error
        for key in option_keys:
            options |= _select(values, key)  # task.eval adds to task.train
            try:
                part_config(module, options)
            except KeyedError as error:
                raise KeyedError(error.message, f"{key}.{error.key}".rstrip(".")) from error
        if folder == "objectives":
            _check_needs(recipe, recipe.algorithm.objective["name"], vars(module).get("NEEDS", ()))
    _check_auxiliary(recipe)


def _check_recorded_log_probs(recipe: Recipe) -> None:
    """`behavior: rollout` takes the log-probs that the sampler recorded for those of the policy that is trained."""
    if recipe.algorithm.behavior != "rollout" or "online" not in recipe.run.phases:
        return
    problem = _inexact_log_probs(recipe)
    if problem is not None:
        raise KeyedError(f"rollout needs exact recorded log-probs, but {problem}; use recompute", "algorithm.behavior")


def _inexact_log_probs(recipe: Recipe) -> str | None:
    """Why the likelihood of a rollout does not follow from the log-probs that it recorded; None when it does."""
    from rlhub.samplers import log_probs

    sampler, algorithm = recipe.sampler, recipe.algorithm
    module = load_part("samplers", sampler.name)
    meaning = log_probs(module, part_config(module, sampler.options))
    likelihood = algorithm.likelihood["name"]
    scored = _stated("likelihoods", likelihood, "SCORES")
    in_order = scored not in (None, "own_steps")
    merges = _merges_steps("likelihoods", algorithm.likelihood) or _merges_steps("views", algorithm.views)
    problems = {
        f"{sampler.name} chooses positions by draws that it does not record": meaning == "none",
        "under sampler.eos last positions wait for draws that are not recorded": sampler.eos == "last",
        f"those of sampler.cache {sampler.cache} are of stale keys and values": sampler.cache != "exact",
        "those under sampler.guidance are of guided logits": sampler.guidance != 0,
        f"the likelihood {likelihood} does not score the rollout's own steps": scored is None,
        f"the likelihood {likelihood} merges steps": scored == "own_steps" and merges,
        f"the likelihood {likelihood} is that of {scored}, not of {sampler.name}": in_order and getattr(module, "ORDER", None) != scored,
        "under algorithm.length response training sees less of the canvas than the sampler did": algorithm.length == "response",
        f"tokens that sampler.early_stop fills in have none, and the likelihood {likelihood} counts them": in_order
        and sampler.early_stop == "fill_eos",
    }
    return next((problem for problem, applies in problems.items() if applies), None)


def _stated(folder: str, name: Any, attribute: str) -> Any:
    """What a part states of itself; None where it states nothing or cannot be loaded, which another check reports."""
    try:
        return getattr(load_part(folder, name), attribute, None)
    except RecipeError:
        return None


def _merges_steps(folder: str, part: Part) -> bool:
    """Whether views or a likelihood take several denoising steps as one."""
    module = load_part(folder, part["name"])
    return hasattr(module, "merges_steps") and module.merges_steps(part_config(module, part))


def _check_asynchrony(recipe: Recipe) -> None:
    """What training on rollouts of older weights needs."""
    algorithm, key = recipe.algorithm, "algorithm.correction"
    if algorithm.max_staleness == 0:
        if recipe.weights.in_flight:
            message = "true, but with algorithm.max_staleness 0 nothing is generated while weights are sent; use false, or a max_staleness"
            raise KeyedError(message, "weights.in_flight")
        return
    if "online" not in recipe.run.phases:
        message = f"{algorithm.max_staleness}, but only the phase online generates what can be stale; use 0"
        raise KeyedError(message, "algorithm.max_staleness")
    if algorithm.correction == "none" or algorithm.behavior == "rollout":
        return
    objective = algorithm.objective["name"]
    problem = _inexact_log_probs(recipe)
    if not getattr(load_part("objectives", objective), "ADVANTAGES", True):
        problem = f"{objective} has no advantages to weigh"
    if problem is not None:
        fix = "set algorithm.correction=none, algorithm.max_staleness=0 or an exact sampler and likelihood (docs/asynchrony.md)"
        raise KeyedError(f"auto weighs stale rollouts by their recorded log-probs, but {problem}; {fix}", key)


def _check_grader_function(reward: Part) -> None:
    """A reward given as a function, `module:function` or `file.py:function`."""
    from rewards import load_grader

    try:
        load_grader(reward)
    except Exception as error:  # a user's file may fail in any way while it is imported
        raise KeyedError(one_line(error), "task.reward.name") from error


def _check_needs(recipe: Recipe, name: str, needs: Sequence[str]) -> None:
    """Policies that the objective or the KL compares with must exist, and somebody must score the reference."""
    algorithm = recipe.algorithm
    if isinstance(needs, str) or set(needs) - {"proximal", "reference"}:
        raise KeyedError(f"NEEDS of {name} must be a tuple of proximal and reference, got {needs!r}", "algorithm.objective.name")
    if "reference" in needs and algorithm.reference == "none":
        raise KeyedError(f"{name} compares with the reference policy, got none; use frozen or sync_every:N", "algorithm.reference")
    if "proximal" in needs and algorithm.behavior == "none":
        raise KeyedError(f"{name} is a ratio to the policy that generated, got none; use recompute", "algorithm.behavior")
    needs_reference = "reference" in needs or (algorithm.kl.coefficient > 0 and algorithm.kl.against == "reference")
    needs_reference &= algorithm.reference != "adapter_off"  # which the learners hold
    if needs_reference and recipe.roles.scorers == 0 and recipe.run.phases != ["sft"]:
        raise KeyedError("0 scorers, but the objective or the KL needs the reference policy; use at least 1", "roles.scorers")


def _check_auxiliary(recipe: Recipe) -> None:
    """Terms that are added to the loss."""
    key = "algorithm.auxiliary"
    for term in recipe.algorithm.auxiliary:
        for needed in ("name", "weight"):
            if needed not in term:
                raise KeyedError(f"{show(term)} lacks {needed}; write for example {{name: sft, weight: 0.05, on: chosen}}", key)
        on = term.get("on", "all")
        if on not in ("chosen", "rejected", "all"):
            raise KeyedError(f"no such choice {on!r} of samples{did_you_mean(on, ['chosen', 'rejected', 'all'])}", key)
        if not isinstance(term["weight"], int | float) or not 0 <= term["weight"] < float("inf"):
            raise KeyedError(f"weight must be 0 or more, got {show(term['weight'])}", key)
        try:
            module = load_part("objectives", term["name"])
            part_config(module, {name: value for name, value in term.items() if name not in ("weight", "on")})
        except KeyedError as error:
            raise KeyedError(f"{term['name']}: {error}", key) from error
        except RecipeError as error:
            raise KeyedError(str(error), key) from error
        _check_needs(recipe, term["name"], vars(module).get("NEEDS", ()))


def _check_rope(recipe: Recipe) -> None:
    rope = recipe.model.rope
    if rope.scaling != "none" and rope.target_length is None:
        raise KeyedError(f"scaling {rope.scaling} needs the tokens of the longer context", "model.rope.target_length")
    if rope.scaling == "none" and rope.target_length is not None:
        raise KeyedError("scaling is none, so there is nothing to reach; use diffusion_ntk", "model.rope.scaling")


def _check_router(recipe: Recipe) -> None:
    if recipe.model.router.replay and recipe.algorithm.updates == 1:
        raise KeyedError("must be false with algorithm.updates=1, as only later updates replay, got true", "model.router.replay")


def _check_adapters(recipe: Recipe) -> None:
    model, key = recipe.model, "model.adapter"
    if model.adapter is not None and model.lora.rank:
        raise KeyedError(f"{model.adapter} brings its own rank, but model.lora.rank is {model.lora.rank}; use 0", key)
    if model.adapter is not None and model.path is None:
        raise KeyedError("an adapter needs its base; set model.path", key)
    if model.adapter is not None and not Path(model.adapter).is_dir():
        raise KeyedError(f"no folder {model.adapter!r}{_similar_folders(Path(model.adapter))}", key)
    adapted = model.adapter is not None or model.lora.rank or (model.path and not (Path(model.path) / "config.json").is_file())
    if recipe.algorithm.reference == "adapter_off" and not adapted:
        raise KeyedError(
            "adapter_off is the model without its adapter, but all weights are trained; set model.lora.rank, or use frozen",
            "algorithm.reference",
        )


def _check_pairs(recipe: Recipe) -> None:
    """What training on preference data needs."""
    if "online" in recipe.run.phases and recipe.task.reward.get("name") == "none":
        raise KeyedError("none, but the online phase needs grades; name a module of rewards", "task.reward.name")
    if "pairs" not in recipe.run.phases:
        return
    algorithm, pairs = recipe.algorithm, recipe.pairs
    if not pairs.data and task_kind(recipe) != "preferences":
        why = f"the phase pairs needs data, and task {recipe.task.name} brings none"
        raise KeyedError(f"{why}; set pairs.data.path to a file or source", "pairs.data")
    if pairs.data:
        try:
            part_config(load_part("tasks", "preferences"), pairs.data)
        except KeyedError as error:
            raise KeyedError(error.message, f"pairs.data.{error.key}".rstrip(".")) from error
    if algorithm.behavior == "rollout":
        raise KeyedError("rollout needs the log-probs of a sampler, which preference data has not; use none", "algorithm.behavior")
    views = algorithm.views.get("name")
    if _stated("views", views, "REPLAYS"):
        raise KeyedError(f"{views} replays a sampler, and preference data has none; use elbo", "algorithm.views.name")
    if pairs.reference_cache not in ("auto", "none"):
        if algorithm.reference.startswith("sync_every"):
            key = "pairs.reference_cache"
            raise KeyedError("a reference that follows the policy cannot be cached; use none, or algorithm.reference=frozen", key)
        if algorithm.fresh_views not in ("epoch", "never"):
            key = "algorithm.fresh_views"
            raise KeyedError(f"{algorithm.fresh_views} never repeats its noise, so nothing can be cached; use epoch", key)


def _select(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of nested mappings; None where a name is missing."""
    for part in key.split("."):
        values = values.get(part)  # type: ignore[assignment]
    return values


def _similar_folders(path: Path) -> str:
    """Names of folders that a missing one may have meant, and the way out."""
    folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, folders, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else "; set model.path to a downloaded checkpoint, or null for random weights"


def _nearest(value: int, fits: Any, highest: int | None = None) -> str:
    """The nearest fitting numbers below and above, in words."""
    below = next((number for number in range(value, 0, -1) if fits(number)), None)
    above = next((number for number in range(value, (highest or 2 * value + 1) + 1) if fits(number)), None)
    return " or ".join(str(number) for number in dict.fromkeys((below, above)) if number)


def check_settings(settings: SamplerConfig) -> None:
    """Raises ValueError for settings of a sampler that the engine does not serve, beginning with their key."""
    if settings.guidance:
        raise ValueError("sampler.guidance: the engine vllm does not run a row twice; use roles.engine: torch, or sampler.guidance: 0")
    if settings.cache != "exact":
        raise ValueError(f"sampler.cache: {settings.cache} is the torch engine's; use roles.engine: torch, or sampler.cache: exact")
