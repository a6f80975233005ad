"""Stand-ins for the Triton kernels with which vLLM's second model runner keeps its books, for machines without Triton.

Each takes what its kernel takes, loops over the requests of a step, and is registered through vLLM's own dispatcher. Tables of a KV cache
group are given by address, as the kernels want them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON, triton
from vllm.triton_utils.dispatcher import register_kernels


def _int32(address: int, count: int) -> np.ndarray:
    """The int32 numbers at an address."""
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


def _table_row(addresses: Tensor, strides: Tensor, group: int, row: int) -> np.ndarray:
    """One request's row of a group's block table."""
    stride = int(strides[group])
    return _int32(int(addresses[group]) + 4 * row * stride, stride)


def apply_write(out, stride, rows, starts, contents, ends, groups, BLOCK_SIZE=0, MULTI_GROUP=False) -> None:
    begin = 0
    for index, (row, start, end) in enumerate(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)):
        if MULTI_GROUP:
            _table_row(out, stride, int(groups[index]), row)[start : start + end - begin] = contents[begin:end].numpy()
        else:
            out.view(-1)[row * stride + start :][: end - begin] = contents[begin:end]
        begin = end


def gather_block_tables(rows, sources, targets, strides, num_blocks, num_blocks_stride, num_reqs, BLOCK_SIZE=0) -> None:
    for group in range(len(sources)):
        for place, row in enumerate(rows.tolist()):
            count = int(num_blocks[group, row])
            _table_row(targets, strides, group, place)[:count] = _table_row(sources, strides, group, row)[:count]


def compute_slot_mappings(
    max_num_tokens, rows, bounds, positions, tables, strides, sizes, enabled, dcp_sharded, slots, slots_stride, cp_rank, **constants: Any
) -> None:
    """Stand-in for the Triton kernel of the same name: where the keys of each position go, int64 slots, PAD_ID where nowhere."""
    if constants["CP_SIZE"] != 1:
        raise NotImplementedError("context parallelism has no CPU kernel")
    bounds, positions = bounds.tolist(), positions.numpy()
    for group in range(len(tables)):
        out, size = slots[group].numpy(), int(sizes[group])
        out[bounds[len(rows)] : max_num_tokens] = constants["PAD_ID"]
        for place, row in enumerate(rows.tolist()):
            begin, end = bounds[place], bounds[place + 1]
            if row < 0 or not enabled[group]:
                out[begin:end] = constants["PAD_ID"]
                continue
            page, within = np.divmod(positions[begin:end], size)
            out[begin:end] = _table_row(tables, strides, group, row)[page].astype(np.int64) * size + within


def prepare_prefill_inputs(
    input_ids, next_tokens, next_stride, num_lookahead, rows, bounds, tokens, tokens_stride, lengths, computed, **constants: Any
) -> None:
    bounds = bounds.tolist()
    for place, row in enumerate(rows.tolist()):
        done, count = int(computed[row]), bounds[place + 1] - bounds[place]
        if done < int(lengths[row]):
            input_ids[bounds[place] : bounds[place + 1]] = tokens[row, done : done + count]


def prepare_pos_seq_lens(positions, seq_lens, rows, bounds, computed, max_num_reqs, BLOCK_SIZE=0) -> None:
    bounds = bounds.tolist()
    seq_lens[len(rows) : max_num_reqs] = 0
    for place, row in enumerate(rows.tolist()):
        begin, end, done = bounds[place], bounds[place + 1], int(computed[row])
        seq_lens[place] = done + end - begin
        positions[begin:end] = torch.arange(done, done + end - begin)


def combine_sampled_and_draft_tokens(
    input_ids, rows, last_sampled, bounds, seq_lens, prefill_lens, drafts, drafts_stride, logits_bounds, logits_indices, **constants: Any
) -> None:
    bounds, logits_bounds = bounds.tolist(), logits_bounds.tolist()
    for place, row in enumerate(rows.tolist()):
        begin, end = logits_bounds[place], logits_bounds[place + 1]
        first = bounds[place + 1] - (end - begin)
        logits_indices[begin:end] = torch.arange(first, bounds[place + 1])
        if int(seq_lens[place]) > int(prefill_lens[row]):  # a canvas: all of its tokens are drafts
            input_ids[first : bounds[place + 1]] = drafts[row, : end - begin]


def post_update(
    rows, computed, last, bins, bins_stride, sampled, sampled_stride, num_sampled, num_rejected, bounds, tokens, stride, total_lens, **_
) -> None:
    for place, row in enumerate(rows.tolist()):
        count = int(num_sampled[place])
        if count:
            total = int(total_lens[row])
            tokens[row, total : total + count] = sampled[place, :count].to(tokens.dtype)
            total_lens[row] = total + count
        computed[row] += int(bounds[place + 1] - bounds[place]) - int(num_rejected[place])


def expand_idx_mapping(rows, expanded_rows, expanded_places, bounds, BLOCK_SIZE=0) -> None:
    bounds = bounds.tolist()
    for place, row in enumerate(rows.tolist()):
        begin, end = bounds[place], bounds[place + 1]
        expanded_rows[begin:end] = row
        expanded_places[begin:end] = torch.arange(end - begin)


KERNELS = {
    "buffer_utils._apply_write_kernel": apply_write,
    "block_table._gather_block_tables_kernel": gather_block_tables,
    "block_table._compute_slot_mappings_kernel": compute_slot_mappings,
    "input_batch._prepare_prefill_inputs_kernel": prepare_prefill_inputs,
    "input_batch._prepare_pos_seq_lens_kernel": prepare_pos_seq_lens,
    "input_batch._combine_sampled_and_draft_tokens_kernel": combine_sampled_and_draft_tokens,
    "input_batch._post_update_kernel": post_update,
    "input_batch._expand_idx_mapping_kernel": expand_idx_mapping,
}
_installed = False


def install() -> None:
    """Register them where there is no Triton; called in the process of a worker."""
    global _installed
    if _installed or HAS_TRITON or not current_platform.is_cpu():
        return
    _installed = True
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = lambda number: 1 << max(0, number - 1).bit_length()
    register_kernels({f"vllm.v1.worker.gpu.{name}": kernel for name, kernel in KERNELS.items()})
