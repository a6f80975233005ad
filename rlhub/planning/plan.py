"""What a recipe will do, before it does it: batch arithmetic, model forwards, placement and memory.

Needs no Ray, DeepSpeed or GPU: the network is built on torch's meta device, without memory, to count its parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhub.config.schema import ModelConfig, Recipe
from rlhub.config.tasks import task_kind
from rlhub.errors import RecipeError
from rlhub.planning.memory import Memory, serving_memory, training_memory
from rlhub.planning.notes import notes_of
from rlhub.planning.quantities import PROMPTS_READ, BatchPlan, Forwards, PairsPlan, Plan, Prompts, optimizer_steps_of, roles_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

    from rlhub.algorithm.compose import Algorithm
    from rlhub.networks.decoder import Decoder

CHARACTERS_PER_TOKEN = 4  # of English text, where no tokenizer is at hand
BYTES = {"float32": 4, "bfloat16": 2}


def make_plan(recipe: Recipe) -> Plan:
    """The plan of a checked recipe.

    Raises:
        RecipeError: the model, its tokenizer and the task do not fit each other.
        DataError: the task's data cannot be read.
    """
    from rlhub.algorithm.compose import Algorithm

    algorithm = Algorithm.compose(recipe.algorithm)
    absent = _absent_data(recipe)
    is_task = task_kind(recipe) in ("preferences", "documents")
    tokenizer = None if absent and is_task and recipe.model.path is None else _tokenizer(recipe)
    network = meta_network(recipe.model, tokenizer and len(tokenizer))
    notes = [f"{absent} is not there yet: sizes of the data are unknown; download or make it before training"] if absent else []
    if absent and is_task:
        prompts = Prompts(0.0, 0, True)
    else:
        prompts, more = _read_prompts(recipe, tokenizer)
        notes += more
    if recipe.task.reward["name"] != "none" or task_kind(recipe) == "documents":
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
        optimizer_steps=optimizer_steps_of(recipe),
        roles=roles_of(recipe),
        memory=_memory(recipe, network, batch, pairs),
        notes=[
            *notes,
            *notes_of(recipe, network, algorithm, batch),
        ],
        pairs=pairs,
    )


def meta_network(model: ModelConfig, vocab_size: int | None = None) -> Decoder:
    """The network without memory, from the checkpoint's config.json where there is one, else from `model.config`.

    Args:
        vocab_size: of the task's own tokenizer, which decides for a model that starts from random weights.
    """
    import torch

    from rlhub.checkpoints.folders import empty_network, family_of, published_config, published_form
    from rlhub.checkpoints.sealed import resolve_model_path
    from rlhub.networks.rope import extend
    from rlhub.parts import load_part, part_config

    if model.path and Path(model.path).is_dir():
        folder = resolve_model_path(Path(model.path))
        config = empty_network(published_config(folder), str(folder)).config
        family = family_of(published_form(config))
    else:
        family = load_part("models", model.family)
        config = part_config(family, model.config | ({"vocab_size": vocab_size} if vocab_size and not model.path else {}))
    with torch.device("meta"):
        return family.build(extend(config, model.rope))


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
    if task_kind(recipe) == "documents":
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
    from rlhub.algorithm.pairs import preference_source
    from rlhub.tasks.documents import TEXT
    from rlhub.tasks.jsonl import JSON_LINES, PARQUET

    if task_kind(recipe) == "documents":
        path = recipe.task.train.get("path", "")
        return path if path.endswith((*JSON_LINES, *PARQUET, *TEXT, "/")) and not Path(path).exists() else None

    if "pairs" not in recipe.run.phases and task_kind(recipe) != "preferences":
        return None
    path = preference_source(recipe)[1].path
    return path if path.endswith(JSON_LINES + PARQUET) and not Path(path).is_file() else None


def _pairs(recipe: Recipe, algorithm: Algorithm, tokenizer: Any, context: int, absent: str | None) -> PairsPlan:
    """Epochs, noise plans and what the reference costs, from the data where it is there."""
    from rlhub.algorithm.pairs import cache_folder, encode, pair_order, preference_source

    module, source = preference_source(recipe)
    limit = min(recipe.pairs.max_tokens or context, context)
    group = 1 if getattr(algorithm.advantage[0], "UNPAIRED", False) else 2
    row, response, num_pairs, num_bad = limit, limit, None, 0
    if not absent:
        good, bad = module.load_preferences(source, "train")
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
    """How the sequences of a step are shared out over learners and micro-batches."""
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
