"""The rollout engine that owns its sampler: batched denoising with keyed noise, exact in fp32.

A rollout depends on its own request's uid, the weights and the sampler settings, never on what else is in the batch: noise is keyed by
(uid, step, position) and rows do not see each other. Each row has a block and a step of its own, leaves when it is finished, and makes
room for a request that waits. Logits exist only for positions that the sampler asks about, a slice of them at a time.

Weights may change between two steps: rows at work keep their canvases, and each token is labelled with the version that committed it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm.scoring import guided_logits
from rlhub.config.schema import SamplerConfig
from rlhub.engines import device_noise
from rlhub.engines.forward import Forward, Slots
from rlhub.engines.row_stats import Law, TokenNoise, streamed_stats
from rlhub.errors import DataError
from rlhub.networks.decoder import Decoder
from rlhub.networks.finite import check_finite
from rlhub.noise import Noise, Stream
from rlhub.parts import load_part, part_config
from rlhub.samplers import CanvasState, Commit, RowStats
from rlhub.types import NEVER, Request, Rollout


class Engine:
    """Generates completions with a `denoise`/`head` model.

    Args:
        model: any family of `rlhub.models`.
        max_rows: rows denoised at once; further requests take the places of finished rows.
    """

    def __init__(self, model: Decoder, device: torch.device | str = "cpu", max_rows: int = 512) -> None:
        self.model, self.device, self.max_rows = model, torch.device(device), max_rows
        self.running: RunningRows | None = None

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
            version: of the weights, the label of the tokens.
            on_step: called after each step of the rows at work. The model may get other weights there, see `weights_changed`.

        Raises:
            DataError: a prompt with its canvas exceeds the model's context.
            CheckpointError: a log-prob is not a number.
            ValueError: the settings do not fit together.
        """
        check_context(requests, settings, self.model.max_length)
        if not requests:
            return []
        self.running = RunningRows(self, requests, settings, noise, version)
        try:
            rollouts = self.running.run(on_step)
        finally:
            self.running = None
        check_rollouts(rollouts, self.model)
        return rollouts

    def weights_changed(self, version: int) -> None:
        """The model has other weights now, which are `version`; called while no step is at work.

        Rows at work continue as they would with an engine that finds their canvases under these weights: nothing that the weights before
        have computed is used, other than the tokens.
        """
        if self.running is not None:
            self.running.weights_changed(version)


def check_context(requests: Sequence[Request], settings: SamplerConfig, max_length: int) -> None:
    """Raises DataError where a prompt with its canvas exceeds a context of `max_length` tokens."""
    for request in requests:
        if len(request.prompt_ids) + settings.length > max_length:
            raise DataError(
                f"prompt of {len(request.prompt_ids)} tokens plus a canvas of {settings.length} exceeds the model's context of "
                f"{max_length}; shorten the prompt or sampler.length"
            )


def check_rollouts(rollouts: Sequence[Rollout], model: Decoder) -> None:
    """Raises CheckpointError where the model's log-prob of a committed token is not a number; the message names a damaged tensor."""
    numbers = all(not np.isnan(rollout.logp_model[rollout.unmask_step != NEVER]).any() for rollout in rollouts)
    check_finite(numbers, model, "log-probs")


class RunningRows:
    """The requests of one call on their way through the slots, which they occupy in turn.

    Args:
        forward: makes what runs the model, from the model, the slots and the settings; see `rlhub.engines.forward`.
        num_slots: None is the engine's `max_rows`.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        settings: SamplerConfig,
        noise: Noise,
        version: int,
        forward: Callable[..., Forward] = Forward,
        num_slots: int | None = None,
    ) -> None:
        self.model, self.device = engine.model, engine.device
        self.requests, self.settings, self.noise, self.version = requests, settings, noise, version
        self.sampler = load_part("samplers", settings.name)
        self.config = part_config(self.sampler, settings.options)
        self.schedule = self.sampler.schedule(settings.length, settings.steps, settings.block_length, self.config)
        most = torch.iinfo(torch.int16).max  # the trace numbers steps in int16
        if (self.schedule.num_blocks + 1) * self.schedule.steps_per_block > most:
            raise ValueError(f"sampler.steps: {settings.steps} are more than the {most} that a rollout's trace can number; use fewer")
        self.edits_tokens = getattr(self.sampler, "EDITS", False)
        self.records = {*settings.records, *self.sampler.RECORDS}
        self.needs = {*getattr(self.sampler, "NEEDS", ()), *(self.records & {"entropy"})}
        self.law = Law(
            settings.temperature,
            settings.top_k,
            settings.top_p,
            banned=(self.model.mask_id, *(self.model.profile.stop_ids if settings.eos == "never" else [])),
        )
        self.stops = torch.tensor(self.model.profile.stop_ids, device=self.device)
        self.streams: dict[str, Stream] = {}
        count, length = min(len(requests), num_slots or engine.max_rows), settings.length

        def array(*shape: int, fill: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((count, *shape), fill, dtype=dtype, device=self.device)

        longest = max(len(request.prompt_ids) for request in requests)
        self.slots = Slots(array(longest + length), *(array() for _ in range(6)))
        self.forward = forward(self.model, self.slots, settings)
        self.trace = {
            "unmask_step": array(length, fill=NEVER, dtype=torch.int16),
            "logp_sample": array(length, fill=torch.nan, dtype=torch.float32),
            "logp_model": array(length, fill=torch.nan, dtype=torch.float32),
            "policy_version": array(length, dtype=torch.int32),
        }
        if "entropy" in self.records:
            self.trace["entropy"] = array(length, fill=torch.nan, dtype=torch.float32)
        if "order" in self.records:
            self.trace["order"] = array(length, fill=NEVER, dtype=torch.int16)
        if "fallback" in self.records:
            self.trace["fallback"] = array(length, dtype=torch.bool)
        if "predictions" in self.records:
            steps = (self.schedule.num_blocks + self.forward.block_causal) * self.schedule.steps_per_block
            self.trace["predictions"] = array(steps, length, fill=NEVER, dtype=torch.int32)
        self.empty = {name: values[0].clone() for name, values in self.trace.items()}
        self.edits: list[list[tuple[int, int, int, int]]] = [[] for _ in range(count)]
        self.occupant = [0] * count  # index of the slot's request
        self.uids = array()  # of the slot's request, as signed numbers
        self.results: list[Rollout | None] = [None] * len(requests)

    def run(self, on_step: Callable[[], None] | None = None) -> list[Rollout]:
        """All rollouts, in the order of the requests."""
        waiting = list(range(len(self.requests)))[::-1]
        free, active = list(range(len(self.occupant)))[::-1], []
        while waiting or active:
            if waiting and free:
                new = [(free.pop(), waiting.pop()) for _ in range(min(len(free), len(waiting)))]
                active += [self.admit(slot, index) for slot, index in new]
                prompts = {slot: self.requests[self.occupant[slot]].prompt_ids.tobytes() for slot in active}
                self.forward.admit([slot for slot, _ in new], prompts)
            for slot in self.advance(torch.tensor(active, device=self.device)):
                self.results[self.occupant[slot]] = self.rollout(slot)
                active.remove(slot)
                free.append(slot)
            if on_step is not None:
                on_step()
        return self.results

    def weights_changed(self, version: int) -> None:
        self.version = version
        self.forward.forget()

    def admit(self, slot: int, index: int) -> int:
        """A request takes a slot."""
        prompt, slots = self.requests[index].prompt_ids, self.slots
        self.occupant[slot], self.uids[slot] = index, device_noise.signed(self.requests[index].uid)
        slots.tokens[slot, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64)).to(self.device)
        slots.tokens[slot, len(prompt) : len(prompt) + self.settings.length] = self.model.mask_id
        slots.prompt_length[slot], slots.first[slot] = len(prompt), -(len(prompt) % self.forward.block_origin)
        slots.block[slot] = slots.step[slot] = slots.idle[slot] = slots.forwards[slot] = 0
        for name, values in self.trace.items():
            values[slot] = self.empty[name]
        self.edits[slot] = []
        return slot

    def advance(self, rows: Tensor) -> list[int]:
        """One step of the rows [R] (their slots); returns the slots that are finished."""
        settings, schedule = self.settings, self.schedule
        view = ActiveBlocks(self, rows)
        choose = getattr(self.sampler, "choose", None)
        everything = settings.eos == "last" or "predictions" in self.records
        chosen = choose(view.state, schedule, view.uniforms, self.config) if choose and settings.eos != "last" else None
        scored = chosen if choose and not everything else view.inside if self.edits_tokens else view.state.masked
        stats = self.score(view, scored)
        if choose:
            if settings.eos == "last":
                chosen = choose(view.state, schedule, view.uniforms, self.config, deferred=stats.deferred)
            commit = Commit(chosen, stats.token)
        else:
            commit = self.sampler.select(stats, view.state, schedule, view.uniforms, self.config)
        self.write(view, stats, commit)
        return self.leave_block(view, commit)

    def score(self, view: ActiveBlocks, scored: Tensor) -> RowStats:
        """Run the model on the rows that have something to score, and describe it."""
        row, column = scored.nonzero()[:, 0], view.columns[scored]
        if "predictions" in self.records:
            row, column = self.with_later_blocks(view, row, column)
        if not len(column):
            return view.grid(
                row, column, {name: column.double() for name in ("logp_model", "logp_sample", *self.needs)} | {"token": column}
            )
        logits_of = self.logits(view, row, column)
        noise = None
        if self.law.temperature > 0:
            noise = TokenNoise(self.stream("token"), self.uids[view.rows[row]], view.state.number[row], column)
        values = streamed_stats(logits_of, len(column), self.model.vocab_size, self.law, noise, self.needs, self.device)
        if "predictions" in self.records:
            self.record_predictions(view, row, column, values["token"])
        return view.grid(row, column, values)

    def logits(self, view: ActiveBlocks, row: Tensor, column: Tensor) -> Callable[[slice], Tensor]:
        """What gives the logits of a slice of canvas positions `column` [M] of rows `row` [M], ascending; with guidance where it is on."""
        settings, model = self.settings, self.forward.model
        used, place = row.unique_consecutive(return_inverse=True)
        hidden = self.forward.hidden(view.rows[used], place, column)
        if not settings.guidance:
            return lambda part: model.head(hidden[part]).float()
        share = (self.canvas(view.rows) == model.mask_id).double().mean(1)
        low, high = settings.guidance_interval
        guided = ((low < share) & (share <= high))[row]
        if not guided.any():
            return lambda part: model.head(hidden[part]).float()
        used, place = row[guided].unique_consecutive(return_inverse=True)
        blind = hidden.index_copy(0, guided.nonzero()[:, 0], self.forward.hidden(view.rows[used], place, column[guided], hide_prompt=True))

        def logits_of(part: slice) -> Tensor:
            seeing = model.head(hidden[part]).float()
            hiding = model.head(blind[part]).float()
            return guided_logits(seeing, hiding, settings.guidance, guided[part])

        return logits_of

    def with_later_blocks(self, view: ActiveBlocks, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of the active blocks and all other masked ones that the forward reaches, ascending by row."""
        if self.forward.block_causal or self.settings.cache == "dual":
            return row, column
        asked = self.canvas(view.rows) == self.model.mask_id
        asked[row, column] = True
        return asked.nonzero(as_tuple=True)

    def canvas(self, rows: Tensor) -> Tensor:
        """int64 [R, L], a copy of the canvases of slots [R]."""
        return self.slots.tokens[
            rows[:, None], self.slots.prompt_length[rows][:, None] + torch.arange(self.settings.length, device=self.device)
        ]

    def record_predictions(self, view: ActiveBlocks, row: Tensor, column: Tensor, token: Tensor) -> None:
        canvas = self.canvas(view.rows).int()
        canvas[canvas == self.model.mask_id] = NEVER
        canvas[row, column] = token.int()
        self.trace["predictions"][view.rows, view.state.number] = canvas

    def write(self, view: ActiveBlocks, stats: RowStats, commit: Commit) -> None:
        """Put the committed tokens into the canvas and their statistics into the trace."""
        allowed = view.inside if self.edits_tokens else view.state.masked
        positions = commit.positions & allowed
        row, cell = positions.nonzero(as_tuple=True)
        slot, column = view.rows[row], view.columns[row, cell]
        place, token = self.slots.prompt_length[slot] + column, commit.tokens[row, cell]
        number = view.state.number[row]
        if self.edits_tokens:
            old = self.slots.tokens[slot, place]
            replaced = (old != self.model.mask_id) & (old != token)
            entries = (values[replaced].tolist() for values in (slot, number, column, old, token))
            for where, *entry in zip(*entries, strict=True):
                self.edits[where].append(tuple(entry))
            number = torch.where(old == self.model.mask_id, number, self.trace["unmask_step"][slot, column])
        self.slots.tokens[slot, place] = token
        self.trace["unmask_step"][slot, column] = number.to(torch.int16)
        self.trace["policy_version"][slot, column] = self.version
        for name in ("logp_sample", "logp_model", "entropy"):
            if name in self.trace:
                self.trace[name][slot, column] = getattr(stats, name)[row, cell].float()
        if "order" in self.trace:
            order = positions.cumsum(1) - 1 if commit.order is None else commit.order
            self.trace["order"][slot, column] = order[row, cell].to(torch.int16)
        if "fallback" in self.trace and commit.fallback is not None:
            self.trace["fallback"][slot, column] = commit.fallback[row]

    def leave_block(self, view: ActiveBlocks, commit: Commit) -> list[int]:
        """Move rows on to their next step or block; returns the slots that are finished."""
        rows, slots, block_length = view.rows, self.slots, self.schedule.block_length
        if commit.done is None:
            left = (slots.tokens[rows[:, None], view.place] == self.model.mask_id) & view.inside
            done = ~left.any(1)
        else:
            done = commit.done
        done = done | (view.state.step == self.schedule.steps_per_block - 1)
        slots.step[rows] = torch.where(done, 0, view.state.step + 1)
        slots.idle[rows] = torch.where(done, 0, view.state.idle + ~view.state.masked.any(1))
        slots.block[rows] = view.state.block + done
        slots.first[rows] = view.state.first + block_length * done
        finished = slots.first[rows] >= self.settings.length
        if self.settings.early_stop == "fill_eos":
            finished |= done & torch.isin(self.canvas(rows), self.stops).any(1)
        return rows[finished].tolist()

    def rollout(self, slot: int) -> Rollout:
        """The record of a finished slot."""
        request, settings, eos_id = self.requests[self.occupant[slot]], self.settings, self.model.eos_id
        start = len(request.prompt_ids)
        canvas = self.slots.tokens[slot, start : start + settings.length].cpu().numpy()
        ends = np.flatnonzero(np.isin(canvas, self.model.profile.stop_ids))
        if settings.early_stop == "fill_eos" and len(ends):
            canvas = np.where(canvas == self.model.mask_id, eos_id, canvas)
        trace = {name: values[slot].cpu().numpy().copy() for name, values in self.trace.items()}
        trace["policy_version"][trace["unmask_step"] == NEVER] = self.version
        return Rollout(
            uid=request.uid,
            group_uid=request.group_uid,
            prompt_ids=request.prompt_ids,
            completion_ids=canvas.astype(np.int32),
            length=int(ends[0]) + 1 if len(ends) else settings.length,
            num_forwards=int(self.slots.forwards[slot]),
            sampler=dataclasses.asdict(settings),
            edits=tuple(self.edits[slot]) if self.edits_tokens or "edits" in self.records else None,
            **trace,
        )

    def stream(self, purpose: str) -> Stream:
        if purpose not in self.streams:
            self.streams[purpose] = self.noise.stream(purpose)
        return self.streams[purpose]


class ActiveBlocks:
    """The active blocks of R rows."""

    def __init__(self, rollouts: RunningRows, rows: Tensor) -> None:
        self.rollouts, self.rows = rollouts, rows
        slots, length, width = rollouts.slots, rollouts.settings.length, rollouts.schedule.block_length
        first, step, prompt_length = slots.first[rows], slots.step[rows], slots.prompt_length[rows]
        self.columns = first[:, None] + torch.arange(width, device=rows.device)  # [R, W], canvas indices
        self.inside = (self.columns >= 0) & (self.columns < length)
        self.place = (prompt_length[:, None] + self.columns).clamp_max(slots.tokens.shape[1] - 1)  # [R, W], in `tokens`
        tokens = slots.tokens[rows[:, None], self.place]
        self.state = CanvasState(
            tokens=tokens,
            masked=(tokens == rollouts.model.mask_id) & self.inside,
            step=step,
            idle=slots.idle[rows],
            block=slots.block[rows],
            number=slots.block[rows] * rollouts.schedule.steps_per_block + step,
            first=first,
            prompt_length=prompt_length,
        )

    def uniforms(self, purpose: str) -> Tensor:
        """float64 [R, W], see `rlhub.samplers`."""
        rollouts, length = self.rollouts, self.rollouts.settings.length
        number = self.state.number
        drawn = device_noise.uniforms(rollouts.stream(purpose), length, rollouts.uids[self.rows], number, torch.zeros_like(number))
        return drawn.gather(1, self.columns.clamp(0, length - 1))

    def grid(self, row: Tensor, column: Tensor, values: dict[str, Tensor]) -> RowStats:
        """Statistics [M] of canvas positions `column` of rows `row` as `[R, W]`; those outside the active blocks are left out."""
        cell = column - self.state.first[row]
        within = (cell >= 0) & (cell < self.columns.shape[1])
        fields = {}
        for name, value in values.items():
            fields[name] = torch.zeros(self.columns.shape, dtype=value.dtype, device=value.device)
            fields[name][row[within], cell[within]] = value[within]
        deferred = torch.isin(fields["token"], self.rollouts.stops) & (self.rollouts.settings.eos == "last")
        return RowStats(deferred=deferred, **fields)
