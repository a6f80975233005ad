"""What a plan warns of, in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rlhub.config.schema import Recipe
from rlhub.engines.vllm_plugin import check_model
from rlhub.planning.quantities import BatchPlan, optimizer_steps_of, roles_of

if TYPE_CHECKING:
    from torch import nn

    from rlhub.algorithm.compose import Algorithm


def notes_of(recipe: Recipe, network: nn.Module, algorithm: Algorithm, batch: BatchPlan) -> list[str]:
    """Everything that a plan warns of, a sentence each.

    Raises:
        UserError: the rollout engine does not serve the model.
    """
    return [
        *_sampler_notes(recipe),
        *_engine_notes(recipe, network),
        *_block_notes(recipe, network, algorithm),
        *_asynchrony_notes(recipe),
        *_general_notes(recipe, batch, algorithm.needs_reference),
    ]


def _block_notes(recipe: Recipe, network: nn.Module, algorithm: Algorithm) -> list[str]:
    """What a block-causal model makes of the views."""
    from rlhub.parts import load_part, part_names

    profile = network.profile
    if profile.attention != "block_causal":
        return []
    name = recipe.algorithm.views["name"]
    notes = [f"the model is block-causal, blocks of {profile.block_length}: rows of an ELBO hold a clean copy of earlier blocks too"]
    if not getattr(algorithm.views[0], "EXACT_ON_BLOCKS", False) and recipe.run.phases != ["sft"]:
        exact = [other for other in part_names("views") if getattr(load_part("views", other), "EXACT_ON_BLOCKS", False)]
        notes.append(
            f"the views {name} mask all blocks at once, but the model generates each after finished ones: the likelihood is a proxy; "
            f"{', '.join(exact)} are none"
        )
    return notes


def _sampler_notes(recipe: Recipe) -> list[str]:
    """What an approximate cache means for the objective."""
    cache = recipe.sampler.cache
    if cache == "exact" or "online" not in recipe.run.phases:
        return []
    return [
        f"sampler.cache {cache} is approximate: rollouts come from another policy than the one that is trained, and objectives that need "
        "its exact log-probs are biased; rlhub.engines.agreement measures by how much"
    ]


def _engine_notes(recipe: Recipe, network: nn.Module) -> list[str]:
    """Whether vLLM's rollouts are the torch engine's. Raises UserError where it does not serve the model."""
    if recipe.roles.engine != "vllm":
        return []
    check_model(network)
    if recipe.model.dtype == "float32":
        return ["roles.engine vllm: rollouts are those of the torch engine, except where two choices are closer than rounding"]
    return [
        f"roles.engine vllm in {recipe.model.dtype} is not exact: rounding depends on what is batched together, so rollouts differ from "
        "the torch engine's and from run to run; model.dtype float32 is exact"
    ]


def _asynchrony_notes(recipe: Recipe) -> list[str]:
    """What training on rollouts of older weights costs, and where it gains nothing."""
    ahead, notes = recipe.algorithm.max_staleness, []
    if ahead and recipe.algorithm.correction == "none" and recipe.algorithm.behavior != "rollout":
        notes.append("algorithm.correction none: rollouts of older weights are trained on as if the newest ones had generated them")
    if ahead and recipe.run.runtime == "local":
        notes.append("algorithm.max_staleness saves no time in one process, where nothing runs at the same time; use run.runtime=ray")
    elif ahead > 1 and not recipe.weights.in_flight:
        notes.append(
            f"algorithm.max_staleness {ahead} is no faster than 1: generators wait for the weights of each step, unless weights.in_flight"
        )
    if recipe.weights.in_flight:
        notes.append("weights.in_flight: when new weights reach a rollout depends on timing, so this run cannot be repeated bit for bit")
    return notes


def _general_notes(recipe: Recipe, batch: BatchPlan, needs_reference: bool) -> list[str]:
    """What works but may not be meant."""
    notes, roles = [], recipe.roles
    fewest, most = batch.sequences_per_learner
    if fewest != most:
        fits = [p for p in range(1, 2 * batch.prompts + roles.learners) if p * batch.completions_per_prompt % roles.learners == 0]
        near = sorted(sorted(fits, key=lambda p: abs(p - batch.prompts))[:2])
        even = " or ".join(map(str, near))
        notes.append(f"{batch.sequences} sequences on {roles.learners} learners: {fewest} or {most} each; prompts_per_step {even} is even")
    if roles.scorers and not needs_reference:
        notes.append("nothing needs the reference policy: the scorers are idle, roles.scorers=0 saves their memory")
    cpus = sum(role.cpus for role in roles_of(recipe))
    if cpus > (os.cpu_count() or 1) and "RAY_ADDRESS" not in os.environ:
        notes.append(f"the roles ask for {cpus} CPU threads, this machine has {os.cpu_count()}: they will share them")
    for phase, steps in optimizer_steps_of(recipe).items():
        optimizer = recipe.sft.optimizer if phase == "sft" else recipe.learner.optimizer
        if optimizer.warmup_steps >= steps:
            notes.append(f"{phase}: the warm-up of {optimizer.warmup_steps} steps does not end within {steps} optimizer steps")
    if recipe.model.path and not Path(recipe.model.path).is_dir():
        notes.append(f"model.path {recipe.model.path} is not there yet: the shape is taken from model.config; download it before training")
    return notes
