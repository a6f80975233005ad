"""Token log-probs of views under a model: the one function that learner, scorer and oracle share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhub.batching import MicroBatch, micro_batches, slice_layout
from rlhub.types import Layout, Views


def micro_batch_log_probs(model: torch.nn.Module, views: Views, run: MicroBatch, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [m] log-probs of the scores of one micro-batch, with gradient when enabled."""
    begin, end = (int(views.layout.row_offsets[row]) for row in (run.first_row, run.last_row))
    layout = to_device(slice_layout(views.layout, run.first_row, run.last_row), device)
    hidden = model.denoise(views.tokens[begin:end].to(device), layout)
    scores = slice(run.first_score, run.last_score)
    rows = views.score_row[scores]
    targets = (views.layout.row_offsets.long()[rows] - begin + views.score_position[scores]).to(device)
    logits = model.head(hidden, targets).float()
    return logits.log_softmax(-1).gather(1, views.score_target[scores].to(device)[:, None]).squeeze(1)


@torch.no_grad()
def token_log_probs(model: torch.nn.Module, views: Views, max_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [M] log-probs of every score, without gradient, on the CPU."""
    parts = [micro_batch_log_probs(model, views, run, device).cpu() for run in micro_batches(views, max_tokens)]
    return torch.cat(parts) if parts else torch.zeros(0)


def to_device(layout: Layout, device: torch.device | str) -> Layout:
    """The same layout with its tensors on `device`."""
    return Layout(
        layout.position_ids.to(device),
        layout.segment_ids.to(device),
        layout.block_ids.to(device),
        layout.row_offsets.to(device),
        layout.attention,
    )
