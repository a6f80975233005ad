"""The rollout engine that owns its sampler: batched denoising with keyed noise, exact in fp32.

A rollout depends on its own request's uid, the weights and the sampler settings, never on what else is in the batch: noise is keyed by
(uid, step, position) and rows do not see each other. Logits exist only for masked positions of the active block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhub.batching import pack_layout
from rlhub.config import SamplerConfig
from rlhub.errors import DataError
from rlhub.noise import Noise, Stream
from rlhub.parts import load_part, part_config
from rlhub.samplers import CanvasState, RowStats
from rlhub.scoring import to_device
from rlhub.types import NEVER, Request, Rollout


class Engine:
    """Generates completions with a `denoise`/`head` model.

    Args:
        model: any family of `rlhub.models`.
        max_rows: rows denoised at once; more requests are served in turns.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device | str = "cpu", max_rows: int = 512) -> None:
        self.model, self.device, self.max_rows = model, torch.device(device), max_rows

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        settings: SamplerConfig,
        noise: Noise,
        version: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per request, in their order.

        Args:
            on_step: called after each denoising step, for progress displays.

        Raises:
            DataError: a prompt with its canvas exceeds the model's context.
            ValueError: the settings do not fit together.
        """
        for request in requests:
            if len(request.prompt_ids) + settings.length > self.model.max_length:
                raise DataError(
                    f"prompt of {len(request.prompt_ids)} tokens plus a canvas of {settings.length} exceeds the model's context of "
                    f"{self.model.max_length}; shorten the prompt or sampler.length"
                )
        rollouts: list[Rollout] = []
        for start in range(0, len(requests), self.max_rows):
            rollouts += self._generate(requests[start : start + self.max_rows], settings, noise, version, on_step)
        return rollouts

    def _generate(self, requests, settings, noise, version, on_step) -> list[Rollout]:
        sampler = load_part("samplers", settings.name)
        schedule = sampler.schedule(settings.length, settings.steps, settings.block_length, part_config(sampler, settings.options))
        mask_id, eos_id = self.model.mask_id, self.model.eos_id
        shape = (len(requests), settings.length)
        canvas = torch.full(shape, mask_id)
        unmask_step = torch.full(shape, NEVER, dtype=torch.int16)
        logp_sample, logp_model = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        forwards = torch.zeros(len(requests), dtype=torch.int64)
        streams = {"token": noise.stream("token"), "position": noise.stream("position")}
        alive = torch.arange(len(requests))
        for block in range(schedule.num_blocks):
            columns = slice(block * schedule.block_length, (block + 1) * schedule.block_length)
            for step in range(schedule.steps_per_block):
                number = block * schedule.steps_per_block + step
                eligible = torch.zeros((len(alive), settings.length), dtype=torch.bool)
                eligible[:, columns] = canvas[alive, columns] == mask_id
                keys = _Keys([requests[row].uid for row in alive.tolist()], number)
                stats = self._stats([requests[row] for row in alive.tolist()], canvas[alive], eligible, settings, streams["token"], keys)
                state = CanvasState(canvas[alive], eligible, step)
                commit = sampler.select(stats, state, schedule, lambda purpose, keys=keys: keys.uniforms(streams[purpose], settings.length))
                rows, cols = commit.positions.nonzero(as_tuple=True)
                target = (alive[rows], cols)
                canvas[target] = commit.tokens[rows, cols]
                unmask_step[target] = number
                logp_sample[target] = stats.logp_sample[rows, cols].float()
                logp_model[target] = stats.logp_model[rows, cols].float()
                forwards[alive] += 1
                if on_step is not None:
                    on_step()
            if settings.early_stop == "fill_eos":
                stopped = (canvas[alive] == eos_id).any(1)
                rest = canvas[alive[stopped]]
                canvas[alive[stopped]] = rest.masked_fill(rest == mask_id, eos_id)
                alive = alive[~stopped]
                if not len(alive):
                    break
        return [
            Rollout(
                uid=request.uid,
                group_uid=request.group_uid,
                prompt_ids=request.prompt_ids,
                completion_ids=canvas[row].numpy().astype(np.int32),
                length=response_length(canvas[row], eos_id),
                unmask_step=unmask_step[row].numpy(),
                logp_sample=logp_sample[row].numpy(),
                logp_model=logp_model[row].numpy(),
                policy_version=np.full(settings.length, version, dtype=np.int32),
                num_forwards=int(forwards[row]),
                sampler=dataclasses.asdict(settings),
            )
            for row, request in enumerate(requests)
        ]

    def _stats(
        self, requests: list[Request], canvas: Tensor, eligible: Tensor, settings: SamplerConfig, stream: Stream, keys: _Keys
    ) -> RowStats:
        """Run the model on prompt and canvas and describe every eligible position."""
        starts = np.array([len(request.prompt_ids) for request in requests])
        lengths = starts + settings.length
        tokens = np.concatenate([part for request, row in zip(requests, canvas.numpy(), strict=True) for part in (request.prompt_ids, row)])
        layout = pack_layout(lengths)
        rows, cols = eligible.nonzero(as_tuple=True)
        targets = layout.row_offsets.long()[rows] + torch.from_numpy(starts)[rows] + cols
        hidden = self.model.denoise(torch.from_numpy(tokens).to(self.device), to_device(layout, self.device))
        logits = self.model.head(hidden, targets.to(self.device)).cpu().double()
        logits[:, self.model.mask_id] = -torch.inf
        if settings.eos == "never":
            logits[:, self.model.eos_id] = -torch.inf
        log_probs = logits.log_softmax(-1)
        if settings.temperature > 0:
            race = torch.from_numpy(keys.exponential(stream, rows.tolist(), cols.tolist(), logits.shape[1]))
            token = (logits / settings.temperature - race.log()).argmax(-1)
            tempered = (logits / settings.temperature).log_softmax(-1)
            logp_sample = tempered.gather(1, token[:, None]).squeeze(1)
        else:
            token = first_argmax(logits)
            logp_sample = torch.zeros(len(token), dtype=torch.float64)
        best = log_probs.topk(2, dim=-1).values.exp()
        probs = log_probs.exp()
        entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)

        def grid(values: Tensor, fill: float) -> Tensor:
            full = torch.full(eligible.shape, fill, dtype=values.dtype)
            full[rows, cols] = values
            return full

        return RowStats(
            token=grid(token, 0),
            logp_model=grid(log_probs.gather(1, token[:, None]).squeeze(1), -torch.inf),
            logp_sample=grid(logp_sample, -torch.inf),
            entropy=grid(entropy, 0.0),
            margin=grid(best[:, 0] - best[:, 1], 0.0),
            deferred=grid((token == self.model.eos_id) & (settings.eos == "last"), False),
        )


class _Keys:
    """The noise keys of the rows at one denoising step."""

    def __init__(self, uids: list[int], step: int) -> None:
        self.uids, self.step = uids, step

    def exponential(self, stream: Stream, rows: list[int], cols: list[int], vocab_size: int) -> np.ndarray:
        """float64 [M, V] standard exponentials. The smallest E / p wins an exact draw from p; log1p keeps small u exact."""
        out = np.empty((len(rows), vocab_size))
        for index, (row, col) in enumerate(zip(rows, cols, strict=True)):
            out[index] = stream.uniform(vocab_size, uid=self.uids[row], step=self.step, position=col)
        return -np.log1p(-out)

    def uniforms(self, stream: Stream, length: int) -> Tensor:
        """float64 [R, L], one uniform per row and position."""
        return torch.from_numpy(np.stack([stream.uniform(length, uid=uid, step=self.step) for uid in self.uids]))


def first_argmax(logits: Tensor) -> Tensor:
    """int64 [M], index of the maximum of each row of [M, V]; the lowest one at ties."""
    best = logits == logits.amax(-1, keepdim=True)
    index = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(best, index, logits.shape[-1]).amin(-1)


def response_length(completion: Tensor, eos_id: int) -> int:
    """Tokens through the first EOS; the whole canvas when there is none."""
    found = (completion == eos_id).nonzero()
    return int(found[0]) + 1 if len(found) else len(completion)
