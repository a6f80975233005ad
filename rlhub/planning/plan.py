"""What a recipe will do, before it does it: batch arithmetic, model forwards, placement and memory.

Needs no Ray, DeepSpeed or GPU: the network is built on torch's meta device, without memory, to count its parameters.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlhub.config.recipe import dump_recipe
from rlhub.config.schema import ModelConfig, Recipe, SamplerConfig
from rlhub.engines.vllm_plugin import check_model
from rlhub.errors import RecipeError
from rlhub.planning.memory import Memory, serving_memory, size_text, training_memory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from rlhub.algorithm.compose import Algorithm
    from rlhub.networks.decoder import Decoder

PROMPTS_READ = 64  # training prompts that the token counts are taken from
CHARACTERS_PER_TOKEN = 4  # of English text, where no tokenizer is at hand
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Prompts:
    """Lengths of the first training prompts in tokens."""

    mean: float
    longest: int
    estimated: bool  # from characters, because there is no tokenizer yet


@dataclass(frozen=True)
class PairsPlan:
    """What a run on preference data goes through; token counts are of its first rows."""

    source: str
    num_pairs: int | None  # usable training rows before tokens are counted; None when the data is not there yet
    num_bad: int
    group_size: int  # 2: pairs, 1: labelled samples
    row_tokens: int  # prompt and response on average
    response_tokens: int
    steps_per_epoch: int
    epochs: float
    noise_plans: int  # that the run looks through; 0 when noise never repeats
    cache: str | None  # folder of the reference's estimates
    cached_forwards: int  # once, for estimates that are not in the cache yet
    forwards_without_cache: int  # of one step


@dataclass(frozen=True)
class BatchPlan:
    prompts: int
    completions_per_prompt: int
    sequences: int
    sequences_per_learner: tuple[int, int]  # fewest and most
    rows_per_sequence: int  # noisy rows that one evaluation of a likelihood scores
    row_tokens: int  # prompt and canvas
    rows_per_micro_batch: int
    micro_batches_per_update: int  # of one learner
    two_pass: bool  # more than one micro-batch: a pass without gradient comes first, which makes the gradient exact


@dataclass(frozen=True)
class Forwards:
    """Model rows of one kind in one step of RL (or of SFT)."""

    kind: str
    rows: int
    forwards: int  # forward passes over them, counted in rows
    backwards: int
    tokens: int  # in forward passes
    why: str


@dataclass(frozen=True)
class RolePlan:
    role: str
    processes: int
    threads: int  # of each process
    cpus: int
    gpus: float


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    parameters: int
    prompts: Prompts
    batch: BatchPlan
    forwards: list[Forwards]
    forwards_per_step: int
    tokens_per_step: int
    optimizer_steps: dict[str, int]  # by phase
    roles: list[RolePlan]
    memory: list[Memory]
    notes: list[str]
    pairs: PairsPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a checked recipe.

    Raises:
        RecipeError: the model, its tokenizer and the task do not fit each other.
        DataError: the task's data cannot be read.
    """
    from rlhub.algorithm.compose import Algorithm

    algorithm = Algorithm.compose(recipe.algorithm)
    absent = _absent_data(recipe)
    is_task = recipe.task.name in ("preferences", "documents")
    tokenizer = None if absent and is_task and recipe.model.path is None else _tokenizer(recipe)
    network = meta_network(recipe.model, tokenizer and len(tokenizer))
    notes = [f"{absent} is not there yet: sizes of the data are unknown; download or make it before training"] if absent else []
    if absent and is_task:
        prompts = Prompts(0.0, 0, True)
    else:
        prompts, more = _read_prompts(recipe, tokenizer)
        notes += more
    if recipe.task.reward["name"] != "none" or recipe.task.name == "documents":
        _check_fit(recipe, prompts, network, tokenizer)
    pairs = _pairs(recipe, algorithm, tokenizer, network.max_length, absent) if "pairs" in recipe.run.phases else None
    batch = _batch(recipe, algorithm, prompts, pairs)
    forwards = _forwards(recipe, algorithm, batch, pairs)
    online = [entry for entry in forwards if entry.kind != "sft"]
    return Plan(
        recipe=recipe,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        prompts=prompts,
        batch=batch,
        forwards=forwards,
        forwards_per_step=sum(entry.forwards for entry in online),
        tokens_per_step=sum(entry.tokens for entry in online),
        optimizer_steps=_optimizer_steps(recipe),
        roles=_roles(recipe),
        memory=_memory(recipe, network, batch, pairs),
        notes=[
            *notes,
            *_sampler_notes(recipe),
            *_engine_notes(recipe, network),
            *_block_notes(recipe, network, algorithm),
            *_asynchrony_notes(recipe),
            *_notes(recipe, batch, algorithm.needs_reference),
        ],
        pairs=pairs,
    )


def meta_network(model: ModelConfig, vocab_size: int | None = None) -> Decoder:
    """The network without memory, from the checkpoint's config.json where there is one, else from `model.config`.

    Args:
        vocab_size: of the task's own tokenizer, which decides for a model that starts from random weights.
    """
    import torch

    from rlhub.checkpoints.folders import empty_network, family_of, published_config
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.networks.rope import extend
    from rlhub.parts import load_part, part_config

    if model.path and Path(model.path).is_dir():
        folder = resolve_model_path(Path(model.path))
        config = empty_network(published_config(folder), str(folder)).config
        family = family_of(config.to_published())
    else:
        family = load_part("models", model.family)
        config = part_config(family, model.config | ({"vocab_size": vocab_size} if vocab_size and not model.path else {}))
    with torch.device("meta"):
        return family.build(extend(config, model.rope))


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


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast | None:
    """The checkpoint's tokenizer, or the task's own for a model that starts from random weights; None before the download."""
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.checkpoints.tokenizers import load_tokenizer
    from rlhub.tasks import task_tokenizer

    if recipe.model.path is None:
        tokenizer = task_tokenizer(recipe.task.name, recipe.task.train)
        if tokenizer is None:
            raise RecipeError(f"model.path: task {recipe.task.name} is plain text and needs a checkpoint with a tokenizer, got null")
        return tokenizer
    folder = Path(recipe.model.path)
    if not folder.is_dir() or not (resolve_model_path(folder) / "tokenizer.json").is_file():
        return None
    return load_tokenizer(str(resolve_model_path(folder)))


def _read_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerFast | None) -> tuple[Prompts, list[str]]:
    """Prompt lengths from the data itself, and what is to be said about the data."""
    from rlhub.checkpoints.tokenizers import encode_prompts
    from rlhub.config.tasks import evaluation_task
    from rlhub.tasks import load_task

    task, notes = recipe.task, []
    train, test = load_task(task.name, task.train, "train", recipe.run.seed), evaluation_task(recipe)
    if test.size is not None and test.size < task.eval_rows:
        notes.append(f"task.eval_rows is {task.eval_rows} but the test split has {test.size} problems: evaluations use those")
    if task.name == "documents":
        notes.append(f"{train.description}, packed {recipe.sft.packing} into rows of sampler.length tokens")
        return Prompts(0.0, 0, tokenizer is None), notes
    texts = [train.example(index).prompt for index in range(min(PROMPTS_READ, train.size or PROMPTS_READ))]
    if tokenizer is None:
        notes.append(f"prompt tokens are estimated from characters: there is no tokenizer.json in {recipe.model.path} yet")
        lengths = [len(str(text)) // CHARACTERS_PER_TOKEN + 1 for text in texts]
    else:
        lengths = [len(ids) for ids in encode_prompts(tokenizer, texts)]
    return Prompts(sum(lengths) / len(lengths), max(lengths), tokenizer is None), notes


def _absent_data(recipe: Recipe) -> str | None:
    """The file or folder with the preference data or the documents when it does not exist yet."""
    from rlhub.algorithm.pairs import source_config
    from rlhub.tasks.documents import TEXT
    from rlhub.tasks.jsonl import JSON_LINES, PARQUET

    if recipe.task.name == "documents":
        path = recipe.task.train.get("path", "")
        return path if path.endswith((*JSON_LINES, *PARQUET, *TEXT, "/")) and not Path(path).exists() else None

    if "pairs" not in recipe.run.phases and recipe.task.name != "preferences":
        return None
    path = source_config(recipe).path
    return path if path.endswith(JSON_LINES + PARQUET) and not Path(path).is_file() else None


def _pairs(recipe: Recipe, algorithm: Algorithm, tokenizer: Any, context: int, absent: str | None) -> PairsPlan:
    """Epochs, noise plans and what the reference costs, from the data where it is there."""
    from rlhub.algorithm.pairs import cache_folder, encode, pair_order, source_config
    from rlhub.tasks.preferences import load_preferences

    source, limit = source_config(recipe), min(recipe.pairs.max_tokens or context, context)
    group = 1 if recipe.algorithm.advantage["name"] == "labels" else 2
    row, response, num_pairs, num_bad = limit, limit, None, 0
    if not absent:
        good, bad = load_preferences(source, "train")
        num_pairs, num_bad, group = len(good), len(bad), len(good[0].responses)
        first = encode(good[:PROMPTS_READ], tokenizer, limit)[0] if tokenizer else None
        if first is not None and len(first):
            lengths = [len(one) for responses in first.responses for one in responses]
            response = round(sum(lengths) / len(lengths))
            row = response + round(sum(map(len, first.prompts)) / len(first))
    order = pair_order(recipe, num_pairs or recipe.algorithm.prompts_per_step)
    needed = order.needed(recipe.run.steps)
    rows = algorithm.views[0].rows_per_sample(algorithm.views[1], recipe.sampler.steps)
    folder = cache_folder(recipe) if algorithm.needs_reference else None
    return PairsPlan(
        source=source.path,
        num_pairs=num_pairs,
        num_bad=num_bad,
        group_size=group,
        row_tokens=row,
        response_tokens=response,
        steps_per_epoch=order.steps_per_epoch,
        epochs=recipe.run.steps / order.steps_per_epoch,
        noise_plans=len(needed),
        cache=None if folder is None else str(folder),
        cached_forwards=sum(needed.values()) * order.num_pairs // order.steps_per_epoch * group * rows if folder else 0,
        forwards_without_cache=recipe.algorithm.prompts_per_step * group * rows * algorithm.num_views if algorithm.needs_reference else 0,
    )


def _check_fit(recipe: Recipe, prompts: Prompts, network: nn.Module, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Raises RecipeError when prompts, canvas, vocabulary and micro-batches do not fit the model and each other."""
    from rlhub.samplers import check_attention

    longest, held = prompts.longest + recipe.sampler.length, recipe.learner.micro_batch_tokens
    if tokenizer and len(tokenizer) > network.vocab_size:
        raise RecipeError(
            f"model.path: the model has {network.vocab_size} tokens, its tokenizer {len(tokenizer)}; give the matching folder"
        )
    if longest > network.max_length:
        raise RecipeError(f"sampler.length: prompt and canvas need {longest} positions but the model has {network.max_length}; shorten it")
    try:
        check_attention(recipe.sampler, network.profile)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if longest > held:
        raise RecipeError(f"learner.micro_batch_tokens: {held} cannot hold one row of {longest} tokens; use at least {longest}")


def _batch(recipe: Recipe, algorithm: Algorithm, prompts: Prompts, pairs: PairsPlan | None) -> BatchPlan:
    views, config = algorithm.views
    group = pairs.group_size if pairs else recipe.algorithm.completions_per_prompt
    sequences = recipe.algorithm.prompts_per_step * group
    rows = views.rows_per_sample(config, recipe.sampler.steps)
    row_tokens = pairs.row_tokens if pairs else round(prompts.mean) + recipe.sampler.length
    fewest, most = sequences // recipe.roles.learners, -(-sequences // recipe.roles.learners)
    per_micro_batch = max(1, recipe.learner.micro_batch_tokens // row_tokens)
    micro_batches = -(-most * rows // per_micro_batch)
    return BatchPlan(
        prompts=recipe.algorithm.prompts_per_step,
        completions_per_prompt=group,
        sequences=sequences,
        sequences_per_learner=(fewest, most),
        rows_per_sequence=rows,
        row_tokens=row_tokens,
        rows_per_micro_batch=per_micro_batch,
        micro_batches_per_update=micro_batches,
        two_pass=micro_batches > 1,
    )


def _forwards(recipe: Recipe, algorithm: Algorithm, batch: BatchPlan, pairs: PairsPlan | None) -> list[Forwards]:
    """Rows of one step: rollouts, then the likelihoods of each policy."""
    config, sampler = recipe.algorithm, recipe.sampler
    scored = batch.sequences * batch.rows_per_sequence
    evaluations = algorithm.num_views  # of a fixed policy: once for each set of views
    entries = []

    def add(kind: str, rows: int, why: str, forwards: int = 1, backwards: int = 0) -> None:
        entries.append(Forwards(kind, rows, forwards * rows, backwards * rows, forwards * rows * batch.row_tokens, why))

    if "sft" in recipe.run.phases:
        rows = recipe.sft.batch_size * recipe.sft.draws
        add("sft", rows, f"{recipe.sft.batch_size} demonstrations x {recipe.sft.draws} draws", backwards=1)
    if "online" in recipe.run.phases:
        add("rollout", batch.sequences * sampler.steps, f"{batch.sequences} sequences x {sampler.steps} denoising steps, at most")
    if "online" in recipe.run.phases or pairs:
        passes = "two passes, the first without gradient" if batch.two_pass else "one pass"
        why = f"{config.updates} updates x {batch.sequences} sequences x {batch.rows_per_sequence} rows, {passes}"
        add("policy", config.updates * scored, why, forwards=2 if batch.two_pass else 1, backwards=1)
        if algorithm.needs_proximal:
            add("proximal", (evaluations - 1) * scored, "the policy before the first update, which itself is free")
        if algorithm.needs_reference:
            cached = pairs is not None and pairs.cache is not None
            why = "read from the cache, see above" if cached else f"{evaluations} sets of views, {config.reference}"
            add("reference", evaluations * scored, why, forwards=0 if cached else 1)
    return entries


def _optimizer_steps(recipe: Recipe) -> dict[str, int]:
    return {phase: recipe.sft.steps if phase == "sft" else recipe.run.steps * recipe.algorithm.updates for phase in recipe.run.phases}


def _roles(recipe: Recipe) -> list[RolePlan]:
    """Processes of each role and what each takes from the machines."""
    roles, threads = recipe.roles, recipe.roles.threads
    if recipe.run.runtime == "local":
        return [RolePlan("all roles", 1, threads, threads, 0)]
    counts = [
        ("controller", 1, 1, 0.0),
        ("generator", roles.generators, threads, roles.gpus_per_generator),
        ("learner", roles.learners, threads, roles.gpus_per_learner),
        ("scorer", roles.scorers, threads, roles.gpus_per_scorer),
        ("reward worker", roles.reward_workers, 1, roles.gpus_per_reward_worker),
    ]
    return [RolePlan(role, count, each, count * each, count * gpus) for role, count, each, gpus in counts if count]


def _memory(recipe: Recipe, network: nn.Module, batch: BatchPlan, pairs: PairsPlan | None) -> list[Memory]:
    """Bytes of one process of each role that holds the model; activations are a rough upper estimate."""
    from rlhub.networks.lora import adapter_size

    size, learner = BYTES[recipe.model.dtype], recipe.learner
    tokens = min(learner.micro_batch_tokens, batch.rows_per_micro_batch * batch.row_tokens)
    scored = tokens * (pairs.response_tokens if pairs else recipe.sampler.length) // batch.row_tokens
    stage = learner.zero_stage if learner.backend == "deepspeed" else 0
    trained = adapter_size(network, recipe.model.lora.rank, recipe.model.lora.targets) if recipe.model.lora.rank else None
    roles = [training_memory("learner", network, size, tokens, scored, stage, recipe.roles.learners, trained)]
    if recipe.roles.generators:
        roles.insert(0, serving_memory("generator", network, size, tokens, scored))
    if recipe.roles.scorers:
        roles.append(serving_memory("scorer", network, size, tokens, scored))
    return roles


def _block_notes(recipe: Recipe, network: nn.Module, algorithm: Algorithm) -> list[str]:
    """What a block-causal model makes of the views."""
    from rlhub.views import EXACT_ON_BLOCKS

    profile = network.profile
    if profile.attention != "block_causal":
        return []
    name = recipe.algorithm.views["name"]
    notes = [f"the model is block-causal, blocks of {profile.block_length}: rows of an ELBO hold a clean copy of earlier blocks too"]
    if name not in EXACT_ON_BLOCKS and recipe.run.phases != ["sft"]:
        notes.append(
            f"the views {name} mask all blocks at once, but the model generates each after finished ones: the likelihood is a proxy; "
            f"{', '.join(EXACT_ON_BLOCKS)} are none"
        )
    return notes


def _sampler_notes(recipe: Recipe) -> list[str]:
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


def _notes(recipe: Recipe, batch: BatchPlan, needs_reference: bool) -> list[str]:
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
    cpus = sum(role.cpus for role in _roles(recipe))
    if cpus > (os.cpu_count() or 1) and "RAY_ADDRESS" not in os.environ:
        notes.append(f"the roles ask for {cpus} CPU threads, this machine has {os.cpu_count()}: they will share them")
    for phase, steps in _optimizer_steps(recipe).items():
        optimizer = recipe.sft.optimizer if phase == "sft" else recipe.learner.optimizer
        if optimizer.warmup_steps >= steps:
            notes.append(f"{phase}: the warm-up of {optimizer.warmup_steps} steps does not end within {steps} optimizer steps")
    if recipe.model.path and not Path(recipe.model.path).is_dir():
        notes.append(f"model.path {recipe.model.path} is not there yet: the shape is taken from model.config; download it before training")
    return notes


def _pairs_table(plan: Plan, pairs: PairsPlan) -> Table:
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
