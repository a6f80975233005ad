"""Preference pairs as batches: tokens, order, what cannot be used, and held-out margins.

A pair is a group of two samples with rewards (1, 0), so every advantage, view, likelihood and objective takes it as it takes rollouts;
an unpaired sample is a group of one. The uid of a sample names its row of the data, so noise is keyed by the row and not by the step,
and the estimates of a frozen reference can be kept (`rlhub.training.reference_cache`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.pairs import Pairs, encode, preference_source
from rlhub.config.schema import AlgorithmConfig, Recipe
from rlhub.errors import DataError
from rlhub.phases import Phase
from rlhub.tasks import Split
from rlhub.tasks.preferences import BadRow
from rlhub.types import Batch
from workers.crew import Crew

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECE = 64  # held-out pairs that are scored at once


@dataclass(frozen=True)
class PairData:
    """The preference data of a run, and the rows of it that cannot be used by split."""

    train: Pairs
    held_out: Pairs
    bad: dict[Split, list[BadRow]]

    @property
    def num_bad(self) -> int:
        return sum(map(len, self.bad.values()))


def load_pairs(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, context: int) -> PairData:
    """The preference data of a recipe, encoded.

    Raises:
        DataError: nothing is usable, or a row is not and the recipe says `on_bad_pair: error`.
    """
    module, config = preference_source(recipe)
    limit = min(recipe.pairs.max_tokens or context, context)
    canvas = recipe.sampler.length if recipe.algorithm.length == "canvas" else 0
    full = recipe.sampler.length if recipe.task.reward["name"] != "none" else 0
    encoded: dict[Split, Pairs] = {}
    bad: dict[Split, list[BadRow]] = {}
    splits: dict[Split, Phase] = {"train": Phase.PAIRS, "test": Phase.EVAL}
    for split, phase in splits.items():
        preferences, unreadable = module.load_preferences(config, split)
        encoded[split], unusable = encode(preferences, tokenizer, limit, full, canvas, phase)
        bad[split] = sorted([*unreadable, *unusable], key=lambda row: row.number)
        if preferences and not len(encoded[split]):
            row = bad[split][0]
            raise DataError(f"{config.path}: none of {len(preferences)} {split} preferences is usable; row {row.number}: {row.reason}")
    data = PairData(encoded["train"], encoded["test"], bad)
    first = next((row for rows in bad.values() for row in rows), None)
    if first is not None and recipe.pairs.on_bad_pair == "error":
        raise DataError(
            f"{config.path}, row {first.number}: {first.reason} ({data.num_bad} such rows); "
            "mend the data, or set pairs.on_bad_pair=skip to train on the others"
        )
    return data


def report_bad(data: PairData, file: Path) -> str | None:
    """Write every unusable row to a JSON-lines file; one line of summary, None when there are none."""
    from rlhub.files import replace_file

    entries = [{"split": split, "row": row.number, "reason": row.reason} for split, rows in data.bad.items() for row in rows]
    replace_file(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    if not entries:
        return None
    usable = len(data.train) + len(data.held_out)
    return f"{len(entries)} of {len(entries) + usable} preference rows cannot be used and are left out; each is in {file}"


def eval_algorithm(recipe: Recipe) -> AlgorithmConfig:
    """What held-out ELBOs are measured with, the same for every algorithm."""
    views = {"name": "elbo", "draws": recipe.pairs.eval_draws, "levels": "stratified"}
    return AlgorithmConfig(advantage={"name": "constant"}, views=views, behavior="none")


def evaluate_pairs(crew: Crew, recipe: Recipe, held_out: Pairs, margins: bool, has_reference: bool) -> dict[str, float]:
    """Held-out preference metrics of the learners' policy on the first `pairs.eval_rows` pairs, under one fixed noise plan.

    Args:
        margins: whether policy and reference are compared, as it makes sense once preferences are trained on.
        has_reference: whether the scorers hold a reference.
    """
    count = min(recipe.pairs.eval_rows, len(held_out))
    if count == 0:
        return {}
    algorithm = Algorithm.compose(eval_algorithm(recipe))
    pieces = np.array_split(np.arange(count), -(-count // PIECE))
    batches = [held_out.batch(piece) for piece in pieces]
    credited = [algorithm.credited(batch) for batch in batches]
    reference = None
    if margins and recipe.algorithm.reference == "adapter_off":
        reference = torch.cat([crew.learners.estimate(algorithm.config, batch, base=True).value for batch in credited])
    elif margins and has_reference:
        seed = recipe.run.seed
        futures = [crew.scorers.begin_estimate(index, algorithm.config, seed, batch) for index, batch in enumerate(credited)]
        reference = torch.cat([part[0].value for part in crew.scorers.collect(futures)])
    policy = torch.cat([crew.learners.estimate(algorithm.config, batch).value for batch in credited])
    return eval_metrics(policy, reference, batches, margins)


def eval_metrics(policy: torch.Tensor, reference: torch.Tensor | None, batches: Sequence[Batch], margins: bool = True) -> dict[str, float]:
    """Held-out preference metrics.

    Args:
        policy, reference: float64 [B], ELBOs of all samples of the batches.

    Keys:
        `eval/pair_accuracy`: share of pairs whose margin is above 0; a margin of exactly 0 counts half.
        `eval/pair_margin`: mean margin in nats: gain of the chosen response over the reference minus that of the rejected one; the
            difference of the ELBOs per token where there is no reference.
        `eval/chosen_elbo_per_token`, `eval/rejected_elbo_per_token`: of the policy, nats.
        `eval/num_pairs`: pairs, or labelled samples.
    """
    length = torch.from_numpy(np.concatenate([batch.scored_length for batch in batches])).double()
    reward = torch.from_numpy(np.concatenate([batch.rewards[batch.group, batch.member] for batch in batches]))
    chosen = reward > 0.5
    metrics: dict[str, float] = {"eval/num_pairs": sum(len(batch.rewards) for batch in batches)}
    for name, which in (("chosen", chosen), ("rejected", ~chosen)):
        if which.any():
            metrics[f"eval/{name}_elbo_per_token"] = (policy / length)[which].mean().item()
    if margins and batches[0].rewards.shape[1] == 2:
        gain = policy / length if reference is None else policy - reference
        margin = gain[chosen] - gain[~chosen]
        metrics["eval/pair_accuracy"] = ((margin > 0).double() + (margin == 0).double() / 2).mean().item()
        metrics["eval/pair_margin"] = margin.mean().item()
    return metrics
