"""Token log-probs of views under a model: the one function that learner, scorer and oracle share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhub.algorithm.batching import MicroBatch, micro_batches
from rlhub.networks.decoder import Decoder
from rlhub.networks.layout import slice_layout, to_device
from rlhub.types import Views


def micro_batch_log_probs(
    model: Decoder, views: Views, run: MicroBatch, device: torch.device | str = "cpu", guidance: float = 0.0
) -> Tensor:
    """fp32 [m] log-probs of the scores of one micro-batch, with gradient when enabled.

    Args:
        guidance: w of unsupervised classifier-free guidance: the law of the logits un + (w + 1) (cond - un), where `un` sees masks in
            place of the prompt. Twice the forwards.
    """
    begin, end = (int(views.layout.row_offsets[row]) for row in (run.first_row, run.last_row))
    layout = to_device(slice_layout(views.layout, run.first_row, run.last_row), device)
    tokens = views.tokens[begin:end]
    scores = slice(run.first_score, run.last_score)
    rows = views.score_row[scores]
    targets = (views.layout.row_offsets.long()[rows] - begin + views.score_position[scores]).to(device)
    logits = model.head(model.denoise(tokens.to(device), layout, targets=targets)).float()
    if guidance:
        hidden = without_prompt(views, run, tokens, model.mask_id).to(device)
        blind = model.head(model.denoise(hidden, layout, targets=targets)).float()
        logits = guided_logits(logits, blind, guidance)
    return logits.log_softmax(-1).gather(1, views.score_target[scores].to(device)[:, None]).squeeze(1)


@torch.no_grad()
def token_log_probs(model: Decoder, views: Views, max_tokens: int, device: torch.device | str = "cpu", guidance: float = 0.0) -> Tensor:
    """fp32 [M] log-probs of every score, without gradient, on the CPU."""
    parts = [micro_batch_log_probs(model, views, run, device, guidance).cpu() for run in micro_batches(views, max_tokens)]
    return torch.cat(parts) if parts else torch.zeros(0)


def guided_logits(seeing: Tensor, blind: Tensor, weight: float, where: Tensor | None = None) -> Tensor:
    """Logits [M, V] of unsupervised classifier-free guidance: un + (w + 1) (cond - un) (SMDM, arXiv 2410.18514, Eq. 7).

    Args:
        seeing, blind: [M, V], of the model that sees the prompt and of the model that sees masks in its place.
        where: bool [M], the rows that are guided; the others are `seeing`.
    """
    logits = torch.add(blind, seeing - blind, alpha=weight + 1)
    return logits if where is None else torch.where(where[:, None], logits, seeing)


def without_prompt(views: Views, run: MicroBatch, tokens: Tensor, mask_id: int) -> Tensor:
    """The tokens of a micro-batch with masks in place of each row's prompt, in its clean copy too where it has one."""
    offsets = views.layout.row_offsets.long()[run.first_row : run.last_row + 1]
    position = views.layout.position_ids
    prompt_length = position[offsets[:-1] + views.completion_start[run.first_row : run.last_row]]
    in_prompt = position[offsets[0] : offsets[-1]] < prompt_length.repeat_interleave(offsets.diff())
    return tokens.masked_fill(in_prompt, mask_id)
