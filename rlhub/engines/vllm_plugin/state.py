"""Canvases as vLLM schedules them.

vLLM's contract for diffusion models, step by step of one request:

    prefill   the prompt is run; no hidden states reach the sampler, which publishes the canvas as draft tokens
    denoise   the canvas is run; all of it counts as rejected, so the next step runs over the same positions and overwrites their keys
    commit    a finished canvas is run once more, so that later ones see its keys and values as they stay; it becomes output
    last      the canvas that ends a request becomes output at once, and an id beyond the vocabulary at its end tells vLLM to stop

Positions here are the network's: vLLM's, less 1 for requests whose canvas begins with their first token (all under the layout `full`,
and those with a prompt shorter than a block). vLLM wants a token of prompt there, so it gets one that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

AttentionLayout = Literal["full", "block", "response"]

SLOT = "rlhub_slot"  # key of a request's row in SamplingParams.extra_args

# (rows [R], hidden [N, D], starts [R]), where the hidden states of a row's canvas begin at its start -> which rows finished their block,
# and which their canvas, [R] each.
Advance = Callable[[Tensor, Tensor, Tensor], tuple[list[bool], list[bool]]]


class Canvases:
    """Where each of the S requests of a run stands.

    Args:
        tokens: int64 [S, N], prompt and canvas of each, which `advance` writes to.
        prompt_lengths: [S]
        length: of the canvas.
        width: see `Driver`.
        mask_id: what fills canvases beyond their end.
    """

    def __init__(
        self,
        layout: AttentionLayout,
        width: int,
        tokens: Tensor,
        prompt_lengths: np.ndarray,
        length: int,
        mask_id: int,
        advance: Advance,
    ) -> None:
        self.layout, self.tokens, self.mask_id, self.advance = layout, tokens, mask_id, advance
        self.origin = prompt_lengths if layout == "response" else np.zeros_like(prompt_lengths)  # where blocks begin to count
        self.end = prompt_lengths + length
        self.width = self.end if layout == "full" else np.full_like(prompt_lengths, width)
        # First position of the canvas that vLLM runs over, which moves on as canvases are committed.
        self.begin = {"full": 0 * prompt_lengths, "response": prompt_lengths, "block": prompt_lengths // width * width}[layout].copy()
        self.shift = (self.begin == 0).astype(np.int64)  # of vLLM's positions against ours
        self.committing = np.zeros(len(prompt_lengths), dtype=bool)

    def canvas(self, slot: int) -> Tensor:
        """int64 [width], the tokens of the canvas at work."""
        begin, width = int(self.begin[slot]), int(self.width[slot])
        inside = self.tokens[slot, begin : min(begin + width, int(self.end[slot]))]
        return torch.nn.functional.pad(inside, (0, width - len(inside)), value=self.mask_id)

    def spans(self, slot: int, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, end of what they see) for runs of positions that see the same; [begin, end) are the ones being run.

        What stands beyond the end of the canvas and the token that vLLM got for a prompt see anything, since nobody sees them.
        """
        origin, width, last = int(self.origin[slot]), int(self.width[slot]), int(self.end[slot])
        while begin < end:
            if begin < 0:
                stop, sees = 0, 1
            elif begin >= last:
                stop = sees = end
            else:
                stop = origin if begin < origin else origin + ((begin - origin) // width + 1) * width
                stop = sees = min(stop, end, last)
            yield begin, stop, sees
            begin = stop


@dataclass
class Driver:
    """What an engine shares with the vLLM model that it drives.

    Attributes:
        layout: full: every token sees prompt and canvas | block: blocks from the prompt's first token, each sees itself and those before
            | response: the prompt is one block, the canvas has blocks of its own.
        width: tokens of a request that vLLM runs over at each step: a block, or under `full` the longest prompt with its canvas.
        canvases: of the run at work.
    """

    network: nn.Module
    layout: AttentionLayout
    width: int
    canvases: Canvases | None = field(default=None)

    @property
    def stop_id(self) -> int:
        """An id that the network has not; it ends a request."""
        return max(self.network.vocab_size, self.network.mask_id + 1)


class DenoisingState(EncoderOnlyModelState):
    """The part of vLLM's model runner that differs between models."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.driver: Driver = model.driver
        self.slots = np.zeros(self.max_num_reqs, dtype=np.int64)  # the run's row of each of vLLM's

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return Sampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.slots[req_index] = new_req_data.sampling_params.extra_args[SLOT]

    def remove_request(self, req_id: str) -> None:
        pass

    def slots_of(self, input_batch: Any) -> np.ndarray:
        """int64 [R], rows of the run in the order of the batch."""
        return self.slots[input_batch.idx_mapping_np[: input_batch.num_reqs]]

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        if self.driver.canvases is None:
            return {}
        shift = self.driver.canvases.shift[self.slots_of(input_batch)].repeat(self._query_lengths(input_batch))
        positions = input_batch.positions.clone()
        positions[: len(shift)] -= torch.from_numpy(shift).to(positions.device)
        return {"positions": positions}

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """What each scheduled position attends to, as vLLM's attention metadata; the arguments are vLLM's."""
        canvases = self.driver.canvases
        if canvases is None:  # vLLM measures its memory
            return super().prepare_attn(
                input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture, ubatch_idx
            )
        if self.driver.layout == "full":
            return self._attend_to_canvas(input_batch)
        slots, lengths = self.slots_of(input_batch), self._query_lengths(input_batch)
        begins = input_batch.num_computed_tokens_np[: len(slots)] - canvases.shift[slots]
        sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        self._shift_slots(slot_mappings, block_tables, sizes, canvases.shift[slots], begins, lengths)
        # Each run of positions that see the same is a sequence of its own to the attention kernel, on the pages of its request. Keys are
        # written before any are read, so attention without a causal mask up to the end of a block is the block-causal mask.
        spans = [
            (place, *span)
            for place, (slot, begin, length) in enumerate(zip(slots.tolist(), begins.tolist(), lengths.tolist(), strict=True))
            for span in canvases.spans(slot, begin, begin + length)
        ]
        place, begin, end, sees = (torch.tensor(column, dtype=torch.int32) for column in zip(*spans, strict=True))
        bounds = torch.nn.functional.pad((end - begin).cumsum(0, dtype=torch.int32), (1, 0))
        rows = place.long().to(self.device)
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=len(spans),
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=bounds.to(self.device),
            query_start_loc_cpu=bounds,
            max_query_len=int((end - begin).max()),
            seq_lens=sees.to(self.device),
            max_seq_len=self.max_model_len,
            block_tables=tuple(table[rows] for table in block_tables),
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=sees,
            causal=False,
        )

    def _query_lengths(self, input_batch: Any) -> np.ndarray:
        return np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1])

    def _shift_slots(
        self,
        slot_mappings: Tensor,
        block_tables: tuple[Tensor, ...],
        sizes: list[int],
        shift: np.ndarray,
        begins: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """Let shifted requests store their keys where the positions of theirs are, in place.

        The prompt token that nobody sees goes to the position behind the last one, which its request owns and does not use in this step.
        """
        starts = lengths.cumsum() - lengths
        for place in shift.nonzero()[0].tolist():
            begin, length = int(begins[place]), int(lengths[place])
            positions = torch.arange(begin, begin + length, device=self.device) % (begin + length + 1)
            for group, (table, size) in enumerate(zip(block_tables, sizes, strict=True)):
                where = table[place][positions // size].long() * size + positions % size
                slot_mappings[group, starts[place] : starts[place] + length] = where

    def _attend_to_canvas(self, input_batch: Any) -> dict[str, Any]:
        """Attention within each canvas, without stored keys."""
        count, num_tokens = input_batch.num_reqs, input_batch.num_tokens
        bounds = torch.from_numpy(input_batch.query_start_loc_np[: count + 1])
        lengths = bounds.diff().int()
        positions = torch.arange(num_tokens) - bounds[:-1].long().repeat_interleave(lengths)
        common = CommonAttentionMetadata(
            query_start_loc=input_batch.query_start_loc[: count + 1],
            query_start_loc_cpu=bounds,
            seq_lens=lengths.to(self.device),
            num_reqs=count,
            num_actual_tokens=num_tokens,
            max_query_len=int(lengths.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=self._dummy_block_table[:count],
            slot_mapping=self._dummy_slot_mapping[:num_tokens],
            seq_lens_cpu_upper_bound=lengths,
            positions=positions.to(self.device),
            causal=False,
        )
        found = {}
        for group in self.encoder_attn_groups:
            metadata = group.get_metadata_builder(0).build(common_prefix_len=0, common_attn_metadata=common)
            found |= dict.fromkeys(group.layer_names, metadata)
        return found


class Sampler:
    """Hands the hidden states of a step to the run, and vLLM what became of its canvases."""

    rejection_sampler = None
    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, base: Any, state: DenoisingState) -> None:
        self.sampling_states, self.logprob_token_ids_state = base.sampling_states, base.logprob_token_ids_state
        self.req_states, self.state = base.req_states, state

    def add_request(self, req_index: int, sampling_params: Any) -> None:
        self.sampling_states.add_request(req_index, sampling_params)

    def apply_staged_writes(self) -> None:
        self.sampling_states.apply_staged_writes()

    def __call__(self, hidden: Tensor, input_batch: Any, draft_logits: Tensor | None = None) -> SamplerOutput:
        """Hand hidden states [N, D] to the run and tell vLLM what became output: nothing of a canvas until it is done."""
        count, device, canvases = input_batch.num_reqs, self.state.device, self.state.driver.canvases
        sampled = torch.zeros(count, 1, dtype=torch.int32, device=device)
        num_sampled, num_rejected = np.zeros((2, count), dtype=np.int32)
        if canvases is not None:  # else vLLM measures its memory
            slots = self.state.slots_of(input_batch)
            bounds = input_batch.cu_num_logits_np[: count + 1]
            ran = np.diff(bounds) > 0
            commits, ends = ran & canvases.committing[slots], np.zeros(count, dtype=bool)
            denoises = ran & ~commits
            if denoises.any():
                rows, starts = (torch.from_numpy(values[denoises].astype(np.int64)).to(device) for values in (slots, bounds[:-1]))
                canvases.committing[slots[denoises]], ends[denoises] = canvases.advance(rows, hidden, starts)
            leaves = commits | ends
            num_sampled[leaves] = canvases.width[slots[leaves]]
            num_rejected[denoises & ~ends] = canvases.width[slots[denoises & ~ends]]
            sampled = sampled.expand(count, max(1, num_sampled.max())).clone()
            for place in leaves.nonzero()[0].tolist():
                slot, width = int(slots[place]), int(num_sampled[place])
                sampled[place, :width] = canvases.canvas(slot).int()
                if ends[place]:
                    sampled[place, width - 1] = self.state.driver.stop_id
                canvases.begin[slot] += width
                canvases.committing[slot] = False
            for place in (~ends).nonzero()[0].tolist():
                canvas = canvases.canvas(int(slots[place]))
                self.req_states.draft_tokens[int(input_batch.idx_mapping_np[place]), : len(canvas)] = canvas
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=torch.from_numpy(num_sampled).to(device),
            num_rejected=torch.from_numpy(num_rejected).to(device),
        )
