"""Running the model on rows that are being denoised: which tokens go in, what a cache may keep, and how many go at once.

    exact, full attention          every step runs over prompt and canvas
    exact, block-causal            the keys and values of finished blocks are kept. A step runs over what is not kept yet: the active block,
                                   at its first step with the block before it, whose last tokens have just been committed
    prefix (approximate)           a refresh runs over everything; other steps over the active block and all after it
    dual (approximate)             a refresh runs over everything; other steps over the active block

The approximate caches are Fast-dLLM's (arXiv 2505.22618): under full attention the kept keys and values are those of the last refresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhub.config.schema import SamplerConfig
from rlhub.networks.cache import CacheView
from rlhub.networks.decoder import Decoder
from rlhub.samplers import check_attention
from rlhub.types import Layout

# Tokens of one call of the model. On a CPU the activations of this many fit into its caches, which is faster than one large call.
TOKENS_AT_ONCE = {"cpu": 1024, "gpu": 1 << 17}


@dataclass
class Slots:
    """The rows being denoised, each in a slot; arrays over `S` slots."""

    tokens: Tensor  # int64 [S, width]: prompt, canvas, then anything
    prompt_length: Tensor  # int64 [S]
    block: Tensor  # int64 [S], the active one
    step: Tensor  # int64 [S], within the block
    idle: Tensor  # int64 [S], steps of the block that began with nothing masked
    first: Tensor  # int64 [S], canvas index of the active block's first position; negative where it begins in the prompt
    forwards: Tensor  # int64 [S]


class Forward:
    """Hidden states for the positions that a step asks about.

    With guidance a row has a double that does not see the prompt, whose kept keys and values are its own.

    Raises:
        ValueError: the settings do not fit the model's attention.
    """

    def __init__(self, model: Decoder, slots: Slots, settings: SamplerConfig) -> None:
        self.model, self.slots, self.settings = model, slots, settings
        check_attention(settings, model.profile)
        self.block_causal = model.profile.attention == "block_causal"
        # Blocks count from the prompt's first token where the model's attention does.
        self.block_origin = settings.block_length if self.block_causal else 1
        self.shift = model.profile.logit_shift
        num_slots, width = slots.tokens.shape
        self.doubles = num_slots * (settings.guidance != 0)  # slot s has its double at doubles + s
        self.cache = model.new_cache(num_slots + self.doubles, width) if self.block_causal or settings.cache != "exact" else None
        nothing = torch.zeros(num_slots + self.doubles, dtype=torch.int64, device=slots.tokens.device)
        self.kept = nothing.clone()  # tokens from the start whose final keys and values are kept (block-causal)
        self.refreshed_block, self.refreshed_step = nothing - 1, nothing.clone()  # of the last refresh (approximate)

    def admit(self, slots: list[int], prompts: dict[int, bytes]) -> None:
        """New rows take slots. `prompts` names the prompt of every row at work; equal ones are run once and shared.

        A prompt that only one row has is run with that row's first step.
        """
        if self.cache is None:
            return
        where = torch.tensor(slots, device=self.kept.device)
        for offset in {0, self.doubles}:
            self.cache.clear(where + offset)
            self.kept[where + offset], self.refreshed_block[where + offset] = 0, -1
        if not self.block_causal:
            return
        new = set(slots)
        for slot in slots:
            length = int(self.slots.prompt_length[slot]) // self.settings.block_length * self.settings.block_length
            same = [other for other, prompt in prompts.items() if prompt == prompts[slot]]
            sources = [other for other in same if self.kept[other] >= length]
            if self.kept[slot] or not length or len(same) == 1:
                continue
            source = sources[0] if sources else slot
            if not sources:
                self._call(torch.tensor([slot], device=where.device), *self.kept.new_tensor([[0], [length]]), None)  # type: ignore[call-arg]
            copies = torch.tensor([other for other in same if other in new and other != source], dtype=torch.int64, device=where.device)
            if len(copies):
                self.cache.copy(source, copies, length)
            self.kept[[source, *copies.tolist()]] = self.kept[[source, *copies.tolist()]].clamp_min(length)

    def forget(self) -> None:
        """Keep nothing that was computed so far, so that the next step of every row runs over all that it sees."""
        if self.cache is None:
            return
        self.cache.clear(torch.arange(self.cache.num_slots, device=self.kept.device))
        self.kept.zero_()
        self.refreshed_block.fill_(-1)

    def hidden(self, rows: Tensor, place: Tensor, column: Tensor, hide_prompt: bool = False) -> Tensor:
        """Hidden states [M, D] that predict canvas position `column` [M] of row `place` [M], ascending, among the slots `rows` [N]."""
        begin, end = self._span(rows, rows + self.doubles * hide_prompt)
        target = self.slots.prompt_length[rows][place] + column
        order = (end - begin).argsort(stable=True)  # rows of equal length side by side need no padding
        found: list[tuple[Tensor, Tensor]] = []
        for part in self._batches((end - begin)[order]):
            chosen = order[part]
            inside = torch.isin(place, chosen)
            rank = torch.empty_like(rows)
            rank[chosen] = torch.arange(len(chosen), device=rows.device)
            targets = rank[place[inside]], target[inside]
            found.append((inside.nonzero()[:, 0], self._call(rows[chosen], begin[chosen], end[chosen], targets, hide_prompt)))
        self.slots.forwards[rows] += 1
        where, hidden = (torch.cat(parts) for parts in zip(*found, strict=True))
        return torch.empty_like(hidden).index_copy_(0, where, hidden)

    def _span(self, rows: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [begin, end) that rows run over, [N] each; `held` are their places in the cache, which is marked as it will be."""
        slots, block_length = self.slots, self.settings.block_length
        begin, end = torch.zeros_like(rows), slots.prompt_length[rows] + self.settings.length
        start = slots.prompt_length[rows] + slots.first[rows]
        if self.block_causal:
            begin = torch.minimum(self.kept[held], (start - self.shift).clamp_min(0))
            end = torch.minimum(end, start + block_length)
            self.kept[held] = start
        elif self.cache is not None:
            block, step, every = slots.block[rows], slots.step[rows], self.settings.cache_refresh
            refresh = self.refreshed_block[held] != block
            if every:
                refresh |= step - self.refreshed_step[held] >= every
            self.refreshed_block[held] = block
            self.refreshed_step[held] = torch.where(refresh, step, self.refreshed_step[held])
            begin = torch.where(refresh, 0, (start - self.shift).clamp_min(0))
            if self.settings.cache == "dual":
                end = torch.where(refresh, end, start + block_length)
        return begin, end

    def _batches(self, lengths: Tensor) -> Iterator[slice]:
        """Cut ascending row lengths [N] into runs of at most TOKENS_AT_ONCE tokens; a longer row is a run of its own."""
        limit = TOKENS_AT_ONCE["cpu" if lengths.device.type == "cpu" else "gpu"]
        first, tokens = 0, 0
        for row, length in enumerate(lengths.tolist()):
            if tokens and tokens + length > limit:
                yield slice(first, row)
                first, tokens = row, 0
            tokens += length
        yield slice(first, len(lengths))

    def _call(
        self, rows: Tensor, begin: Tensor, end: Tensor, targets: tuple[Tensor, Tensor] | None, hide_prompt: bool = False
    ) -> Tensor | None:
        """One call of the model over positions [begin, end) of each row; hidden states of the targets (row, position)."""
        device, lengths = rows.device, end - begin
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        row = torch.arange(len(rows), device=device).repeat_interleave(lengths)
        position = torch.arange(len(row), device=device) - (offsets[:-1] - begin)[row]
        tokens = self.slots.tokens[rows[row], position]
        if hide_prompt:
            tokens = tokens.masked_fill(position < self.slots.prompt_length[rows][row], self.model.mask_id)
        zeros = torch.zeros(len(row), dtype=torch.int32, device=device)
        layout = Layout(position.int(), zeros, zeros, offsets.int())
        cache = None if self.cache is None else CacheView(self.cache, rows + self.doubles * hide_prompt)
        if targets is None:
            self.model.denoise(tokens, layout, cache=cache)
            return None
        place, target = targets
        return self.model.denoise(tokens, layout, targets=(offsets[:-1] - begin)[place] + target, cache=cache)
