"""Supervised training as the families publish it: what of an answer counts, and how the loss weighs it.

what counts       `sft.eos_padding`, `sft.pad_to`, `sft.mask_prompt` and `sft.random_length` change the batch
how it is hidden  `sft.masks`, `sft.mask_range`, `sft.loss_weight` are options of the views `supervised`
denominators      answer_length   (1/B) sum_i loss_i / L_i                    LLaDA (arXiv 2502.09992)
                  batch_tokens    sum_i loss_i / sum_i L_i                    SMDM (arXiv 2410.18514), and pretraining of equal rows
                  masked_tokens   sum_i loss_i / hidden tokens of the batch   Dream (arXiv 2508.15487)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlhub.algorithm.batching import sequence_batch
from rlhub.checkpoints.tokenizers import answer_end, encode_prompts
from rlhub.config.schema import AlgorithmConfig, ModelConfig, Recipe, SFTConfig
from rlhub.errors import DataError
from rlhub.noise import Noise, sample_uid
from rlhub.phases import Phase
from rlhub.tasks import Task
from rlhub.types import NEVER, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def family_weight(model_path: Path) -> str:
    """The loss weight that the family of a model folder is trained with."""
    from rlhub.planning.plan import meta_network

    return meta_network(ModelConfig(path=str(model_path))).profile.loss_weight


def supervised_algorithm(config: SFTConfig, family_weight: str) -> AlgorithmConfig:
    """The parts that a supervised phase is made of.

    Args:
        family_weight: `loss_weight` of the model's profile, which `auto` stands for.
    """
    weight = family_weight if config.loss_weight == "auto" else config.loss_weight
    low, high = config.mask_range
    is_elbo = weight == "inverse_t" and (low, high) == (0, 1) and config.normalize != "masked_tokens"
    counted = "masked" if config.normalize == "masked_tokens" else "scored"
    normalize = "sample" if config.normalize == "answer_length" else "batch"
    return AlgorithmConfig(
        advantage={"name": "constant"},
        views={"name": "supervised", "draws": config.draws, "masks": config.masks, "loss_weight": weight, "low": low, "high": high},
        likelihood={"name": "elbo"} if is_elbo else {"name": "cross_entropy", "count": counted},
        objective={"name": "policy_gradient", "normalize": normalize},
        behavior="none",
    )


def supervised_batch(batch: Batch, config: SFTConfig, eos_id: int, canvas: int, noise: Noise, step: int) -> Batch:
    """The batch of a step with what counts of it.

    Args:
        canvas: tokens that `pad_to: canvas` fills.

    Raises:
        DataError: an answer has no token that counts.
    """
    batch = with_ending(batch, config.eos_padding, eos_id, canvas if config.pad_to == "canvas" else int(batch.response_length.max()))
    batch = whole_sequences(batch) if config.mask_prompt else batch
    return cut_at_random(batch, config.random_length, noise, step)


def with_ending(batch: Batch, eos_padding: str, eos_id: int, width: int) -> Batch:
    """The batch with EOS padding to `width` (`loss`), one EOS (`first`), or none (`none`); unchanged with `auto`.

    Raises:
        DataError: without EOS an answer is empty.
    """
    if eos_padding == "auto":
        return batch
    if eos_padding == "loss":
        padding = [np.full(max(width - len(one), 0), eos_id, dtype=np.int32) for one in batch.completions]
        completions = [np.concatenate([one, more]) for one, more in zip(batch.completions, padding, strict=True)]
        return replace(batch, completions=completions, scored_length=np.maximum(batch.response_length, width))
    if eos_padding == "first":
        return replace(batch, scored_length=batch.response_length)
    last = np.array([one[length - 1] for one, length in zip(batch.completions, batch.response_length, strict=True)])
    scored_length = batch.response_length - (last == eos_id)
    if (scored_length < 1).any():
        raise DataError("sft.eos_padding none leaves nothing of an empty answer; remove it from the data or use first")
    return replace(batch, scored_length=scored_length)


def whole_sequences(batch: Batch) -> Batch:
    """The batch with each prompt as the first part of what is scored."""
    prompt = np.array([len(one) for one in batch.prompts])
    return replace(
        batch,
        prompts=[one[:0] for one in batch.prompts],
        completions=[np.concatenate(pair) for pair in zip(batch.prompts, batch.completions, strict=True)],
        response_length=batch.response_length + prompt,
        scored_length=batch.scored_length + prompt,
        unmask_step=None,
    )


def cut_at_random(batch: Batch, share: float, noise: Noise, step: int) -> Batch:
    """With probability `share` the batch with its rows cut to n ~ U{1..longest} scored tokens (LLaDA, arXiv 2502.09992, sec. 2.2)."""
    decide, where = noise.uniform("sft/random_length", 2, step=step)
    if decide >= share:
        return batch
    longest = int(batch.scored_length.max())
    return replace(batch, scored_length=np.minimum(batch.scored_length, 1 + min(int(where * longest), longest - 1)))


def demonstration_batch(task: Task, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Batch:
    """The supervised batch of one step (1-based): demonstrations, in a chat the end of the turn, and EOS up to the canvas length.

    Raises:
        DataError: a demonstration is missing or longer than the canvas.
    """
    size, canvas = recipe.sft.batch_size, recipe.sampler.length
    first = (step - 1) * size
    examples = [task.example(first + row) for row in range(size)]
    missing = [example.row for example in examples if example.demonstration is None]
    if missing:
        raise DataError(f"task {task.name} has no demonstration for row {missing[0]}; supervised training needs one for each")
    prompts = encode_prompts(tokenizer, [example.prompt for example in examples])
    answers = tokenizer([example.demonstration for example in examples], add_special_tokens=False)["input_ids"]
    completions, lengths = [], []
    for example, answer in zip(examples, answers, strict=True):
        if len(answer) > canvas:
            raise DataError(f"demonstration of row {example.row} has {len(answer)} tokens, sampler.length is {canvas}; raise it")
        ended = [*answer, *answer_end(tokenizer, example.prompt)]
        lengths.append(min(len(ended), canvas))
        completions.append(np.array([*ended, *[tokenizer.eos_token_id] * canvas][:canvas], dtype=np.int32))
    length = np.array(lengths)
    return sequence_batch(
        prompts,
        completions,
        [sample_uid(Phase.SFT.number, step, row, 0) for row in range(size)],
        response_length=length,
        scored_length=np.full(size, canvas) if recipe.algorithm.length == "canvas" else length,
        unmask_step=[np.full(canvas, NEVER, dtype=np.int16)] * size,
        block_length=recipe.sampler.block_length,
    )
