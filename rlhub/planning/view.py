"""A plan as tables for a person to read."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlhub.config.recipe import dump_recipe
from rlhub.config.schema import Recipe, SamplerConfig
from rlhub.planning.memory import size_text
from rlhub.planning.quantities import PROMPTS_READ, BatchPlan, PairsPlan, Plan


def format_plan(plan: Plan) -> str:
    """The plan as plain text."""
    text = StringIO()
    Console(file=text, width=120, color_system=None).print(plan_view(plan))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def plan_view(plan: Plan) -> Group:
    """The plan as rich tables, the resolved recipe first."""
    recipe = Text(dump_recipe(plan.recipe), style="dim", no_wrap=True, overflow="ignore")
    notes = [Text(f"note: {note}", style="yellow") for note in plan.notes]
    pairs = [_pairs_table(plan, plan.pairs)] if plan.pairs else []
    tables = [*pairs, _batch_table(plan), _forward_table(plan), _role_table(plan), _memory_table(plan)]
    return Group(recipe, *(part for table in tables for part in (table, "")), *notes)


def _pairs_table(plan: Plan, pairs: PairsPlan) -> Table:
    """Where the pairs come from, and what the reference costs with and without its cache."""
    unit, algorithm = ("pairs" if pairs.group_size == 2 else "labelled samples"), plan.recipe.algorithm
    table = _table(f"Preference data, run {plan.recipe.run.name}", "quantity", "value")
    bad = f", and {pairs.num_bad} that cannot be used (pairs.on_bad_pair {plan.recipe.pairs.on_bad_pair})" if pairs.num_bad else ""
    table.add_row("training data", "not there yet" if pairs.num_pairs is None else f"{pairs.num_pairs:,} {unit}{bad}")
    of_response = f"{pairs.response_tokens} are the response's"
    table.add_row("a step", f"{algorithm.prompts_per_step} {unit}, {pairs.row_tokens} tokens a row, of which {of_response}")
    if pairs.num_pairs is not None:
        table.add_row("epochs", f"{pairs.epochs:.2f} of {pairs.steps_per_epoch:,} steps")
    noise = f"{pairs.noise_plans} noise plans" if pairs.noise_plans else "new noise every step"
    table.add_row("noise", f"{noise}, {'shared by' if algorithm.shared_noise else 'different for'} policy and reference")
    if pairs.cache:
        per_step = plan.forwards_per_step
        table.add_row("reference", f"{pairs.cached_forwards:,} forwards once, then read from {pairs.cache}")
        table.add_row("forwards of a step", f"{per_step:,} with the cache, {per_step + pairs.forwards_without_cache:,} without")
    return table


def _batch_table(plan: Plan) -> Table:
    """The batch arithmetic of a step."""
    batch, recipe = plan.batch, plan.recipe
    fewest, most = batch.sequences_per_learner
    table = _table(f"Batch of one step, run {recipe.run.name}", "quantity", "value")
    table.add_row("prompts x completions", f"{batch.prompts} x {batch.completions_per_prompt} = {batch.sequences:,} sequences")
    table.add_row("sequences per learner", f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}")
    about = "about " if plan.prompts.estimated else ""
    if plan.prompts.longest:
        most_tokens = f"{plan.prompts.longest} at most in {PROMPTS_READ} prompts"
        table.add_row("prompt tokens", f"{about}{plan.prompts.mean:.0f} on average, {most_tokens}")
    table.add_row("row", f"{batch.row_tokens} tokens" + ("" if plan.pairs else f", canvas of {recipe.sampler.length}"))
    if "online" in recipe.run.phases:
        table.add_row("sampler", sampler_text(recipe.sampler))
        if recipe.algorithm.max_staleness:
            table.add_row("pipeline", _pipeline_text(recipe, batch))
    table.add_row("rows per sequence", f"{batch.rows_per_sequence} ({recipe.algorithm.views['name']})")
    table.add_row("micro-batches per update", f"{batch.micro_batches_per_update} of {batch.rows_per_micro_batch} rows on each learner")
    table.add_row("optimizer steps", ", ".join(f"{phase} {steps:,}" for phase, steps in plan.optimizer_steps.items()))
    table.add_row("parameters", f"{plan.parameters:,} in {recipe.model.dtype}")
    return table


def _pipeline_text(recipe: Recipe, batch: BatchPlan) -> str:
    ahead, config = recipe.algorithm.max_staleness, recipe.algorithm
    if config.behavior == "rollout":
        weights = "ratios against what generated them"
    else:
        weights = "not weighed" if config.correction == "none" else f"weights of at most {config.correction_cap:g}"
    adopted = "amid batches" if recipe.weights.in_flight else "between batches"
    return (
        f"{ahead + 1} batches of {batch.sequences:,} sequences in flight, rollouts up to {ahead} versions old, {weights}; "
        f"new weights are adopted {adopted}"
    )


def sampler_text(sampler: SamplerConfig) -> str:
    """A sampler, the trace fields that it records beside the usual ones, and what its log-probs mean."""
    from rlhub.parts import load_part, part_config
    from rlhub.samplers import log_probs

    module = load_part("samplers", sampler.name)
    records = sorted({*sampler.records, *module.RECORDS})
    meaning = {
        "exact": "log-probs are exact",
        "given_order": "log-probs are exact given the order, which does not depend on the model",
        "none": "log-probs of the rollout are not known",
    }[log_probs(module, part_config(module, sampler.options), sampler.eos)]
    return f"{sampler.name}, records {', '.join(['unmask_step', 'logp', *records])}; {meaning}"


def _forward_table(plan: Plan) -> Table:
    table = _table("Model forwards of one step", "kind", "rows", "forwards", "backwards", "tokens", "why", right=range(1, 5))
    for entry in plan.forwards:
        numbers = (f"{count:,}" for count in (entry.rows, entry.forwards, entry.backwards, entry.tokens))
        table.add_row(entry.kind, *numbers, entry.why)
    if plan.recipe.run.phases != ["sft"]:
        table.add_section()
        name = "one RL step" if "online" in plan.recipe.run.phases else "one step"
        table.add_row(name, "", f"{plan.forwards_per_step:,}", "", f"{plan.tokens_per_step:,}", "without evaluations")
    return table


def _role_table(plan: Plan) -> Table:
    table = _table("Placement", "role", "processes", "threads each", "CPUs", "GPUs", right=range(1, 5))
    for role in plan.roles:
        table.add_row(role.role, str(role.processes), str(role.threads), str(role.cpus), f"{role.gpus:g}")
    table.add_section()
    totals = (str(sum(role.processes for role in plan.roles)), "", str(sum(role.cpus for role in plan.roles)))
    table.add_row("all", *totals, f"{sum(role.gpus for role in plan.roles):g}")
    return table


def _memory_table(plan: Plan) -> Table:
    headings = ("role", "weights", "gradients", "optimizer", "activations, rough", "together")
    table = _table("Memory of one process, estimated", *headings, right=range(1, 6))
    for role in plan.memory:
        sizes = (role.weights, role.gradients, role.optimizer, role.activations, role.total)
        table.add_row(role.role, *map(size_text, sizes))
    return table


def _table(title: str, *columns: str, right: range = range(0)) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left")
    return table
