"""The rollout engine on vLLM: its scheduler, continuous batching and paged keys and values around the same sampler and noise.

vLLM decides what runs in a step and computes attention (`rlhub.engines.vllm_plugin`); from hidden states on, drawing, selection and records
are
those of `torch_engine`, so the same keys give the same rollouts up to rounding, whatever is batched, preempted or found in the prefix
cache. The engine runs in the caller's process and computes with the caller's network: new weights there are new weights here.

vLLM changes how torch uses threads and CUDA streams, so a process that holds this engine should not train. One engine per process.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhub.config.checks import check_settings
from rlhub.config.schema import SamplerConfig
from rlhub.engines.forward import Slots
from rlhub.engines.torch_engine import RunningRows, check_context, check_rollouts
from rlhub.engines.vllm_plugin import check_model, register
from rlhub.errors import UserError
from rlhub.noise import Noise
from rlhub.types import Request, Rollout
from rlhub.vllm_environment import ENVIRONMENT, check_vllm

# Tokens of one step; a step holds whole canvases and prompts. Beyond this a GPU computes no faster, and memory for activations grows.
TOKENS_AT_ONCE = {"cpu": 8192, "gpu": 1 << 15}
KV_BYTES = 1 << 30  # at most, on a CPU; a GPU's free memory is used
PAGE = 32  # tokens of a page of keys and values, at least


class Engine:
    """Generates completions as `torch_engine.Engine` does, with the same arguments and results.

    Args:
        model: a family of the common decoder (`rlhub.networks.decoder`).
        max_rows: requests at work at once; the others wait.
        layout: how tokens attend, see `vllm_plugin.state.Driver`. None: as the family was trained; anything else is another law.
        block_length: of the layouts `block` and `response`; None: the family's. `sampler.block_length` must be the same.
        kv_bytes: memory for keys and values. When it runs out, requests are preempted and resumed later, with the same result.

    Raises:
        UserError: vLLM is missing or of another version, or does not serve the model on this device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device | str = "cpu",
        max_rows: int = 512,
        *,
        layout: str | None = None,
        block_length: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        check_vllm()
        self.model, self.device, self.max_rows = model, torch.device(device), max_rows
        self.layout = layout or ("full" if model.profile.attention == "full" else "block")
        self.block_length = block_length or model.profile.block_length
        os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
        _check_model(model, self.layout, self.block_length, self.device.type == "cpu")
        register()
        from rlhub.engines.vllm_plugin.state import Driver

        longest = model.max_length
        self.driver = Driver(model, self.layout, longest if self.layout == "full" else self.block_length)
        self.tokens_at_once = max(longest + self.driver.width + 2, TOKENS_AT_ONCE["cpu" if self.device.type == "cpu" else "gpu"])
        self.max_running = min(max_rows, self.tokens_at_once // self.driver.width) if self.layout != "full" else max_rows
        self.llm = self._start(kv_bytes)
        self.running: Run | None = None
        self.names = itertools.count()

    def _start(self, kv_bytes: int | None):
        """A vLLM engine around the network in this process.

        Args:
            kv_bytes: of the paged keys and values; None: on a CPU what `max_running` requests need, on a GPU nine tenths of what is free.
        """
        from vllm import LLM

        from rlhub.engines.vllm_plugin.model import LOAD_FORMAT, handing_over, write_config

        shape, on_cpu = self.model.shape, self.device.type == "cpu"
        longest = self.model.max_length + self.driver.width + 2  # vLLM wants room for a step more
        page = PAGE if self.layout == "full" else lcm(PAGE, self.driver.width)
        weight = next(self.model.parameters())
        if kv_bytes is None and on_cpu:
            of_a_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * weight.element_size()
            kv_bytes = max(min(KV_BYTES, of_a_token * (longest + page) * self.max_running), of_a_token * (longest + 2 * page))
        memory = {"kv_cache_memory_bytes": kv_bytes}
        if not on_cpu:
            free, total = torch.cuda.mem_get_info(self.device)
            memory["gpu_memory_utilization"] = 0.9 * free / total
        with tempfile.TemporaryDirectory() as folder, handing_over(self.driver):
            write_config(self.driver, longest, Path(folder))
            return LLM(
                folder,
                load_format=LOAD_FORMAT,
                skip_tokenizer_init=True,
                dtype=str(weight.dtype).removeprefix("torch."),
                max_model_len=longest,
                max_num_seqs=self.max_running,
                max_num_batched_tokens=self.tokens_at_once,
                enable_chunked_prefill=False,  # a chunk may end within a block
                # What is kept for a prefix is exact only where nothing behind it is seen.
                enable_prefix_caching=self.layout == "block",
                block_size=page,
                async_scheduling=False,
                enforce_eager=True,
                disable_log_stats=False,
                diffusion_config={"canvas_length": self.driver.width},
                **memory,
            )

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        settings: SamplerConfig,
        noise: Noise,
        version: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """One rollout per request, in their order; see `torch_engine.Engine.generate`.

        Raises:
            DataError: a prompt with its canvas exceeds the model's context.
            CheckpointError: a log-prob is not a number.
            ValueError: the settings do not fit together, or this engine does not serve them.
        """
        check_context(requests, settings, self.model.max_length)
        check_settings(settings)
        if self.layout != "full" and settings.block_length != self.block_length:
            raise ValueError(f"sampler.block_length: got {settings.block_length}, but the model works in blocks of {self.block_length}")
        if not requests:
            return []
        self.running = Run(self, requests, settings, noise, version)
        try:
            rollouts = self.running.run(on_step)
        finally:
            self.running = None
        check_rollouts(rollouts, self.model)
        return rollouts

    def weights_changed(self, version: int) -> None:
        """See `torch_engine.Engine.weights_changed`.

        vLLM preempts its requests, so that their pages are computed again, and empties the prefix cache. Under the layout `full` it keeps
        no keys and values.
        """
        if self.running is not None:
            self.running.weights_changed(version)
        self.llm.reset_prefix_cache(reset_running_requests=self.layout != "full")

    def metric(self, name: str) -> int:
        """A counter of vLLM's since the start, such as `vllm:num_preemptions`; vLLM counts for the engine that was made last."""
        return next(int(metric.value) for metric in self.llm.get_metrics() if metric.name == name)


def _check_model(model: torch.nn.Module, layout: str, block_length: int | None, on_cpu: bool) -> None:
    check_model(model)
    if layout != "full" and model.profile.logit_shift:
        raise UserError(f"{type(model).__name__} predicts a token from the one before it; the layout {layout} does not serve that")
    if layout != "full" and not block_length:
        raise ValueError(f"layout {layout} needs a block_length")
    if on_cpu:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if model.shape.head_dim not in sizes:
            served = ", ".join(map(str, sizes))
            raise UserError(f"attention heads of {model.shape.head_dim} dimensions: vLLM on a CPU has {served}; use roles.engine: torch")


class Lookup:
    """The place of `forward.Forward` where vLLM has run the model already: finds hidden states of the step at work."""

    def __init__(self, model: torch.nn.Module, slots: Slots, layout: str, block_length: int) -> None:
        self.model, self.slots, self.shift = model, slots, model.profile.logit_shift
        self.block_causal = layout != "full"
        self.block_origin = block_length if layout == "block" else 1
        self.states = torch.empty(0)  # [N, D]
        self.place = torch.zeros_like(slots.prompt_length)  # of the hidden state of each slot's position 0, were it there

    def forget(self) -> None:
        """Nothing is kept here; the engine tells vLLM."""

    def hidden(self, rows: Tensor, place: Tensor, column: Tensor, hide_prompt: bool = False) -> Tensor:
        """Hidden states [M, D] that predict canvas position `column` [M] of row `place` [M] among the slots `rows` [N]."""
        self.slots.forwards[rows] += 1
        source = (self.slots.prompt_length[rows][place] + column - self.shift).clamp_min(0)
        return self.states[self.place[rows][place] + source]


class Run(RunningRows):
    """The requests of one call, a slot for each, advanced by vLLM's steps."""

    def __init__(self, engine: Engine, requests: Sequence[Request], settings: SamplerConfig, noise: Noise, version: int) -> None:
        from rlhub.engines.vllm_plugin.state import Canvases

        def forward(model: torch.nn.Module, slots: Slots, _: SamplerConfig) -> Lookup:
            return Lookup(model, slots, engine.layout, settings.block_length)

        super().__init__(engine, requests, settings, noise, version, forward, num_slots=len(requests))
        self.engine = engine
        for index in range(len(requests)):
            self.admit(index, index)
        lengths = np.array([len(request.prompt_ids) for request in requests])
        self.canvases = Canvases(
            engine.layout, engine.driver.width, self.slots.tokens, lengths, settings.length, self.model.mask_id, self.advance_with
        )

    def run(self, on_step: Callable[[], None] | None = None) -> list[Rollout]:
        """Denoise all requests, as many at a time as fit; the rollouts in the order of the requests.

        An exception leaves no request behind in vLLM.
        """
        engine, vllm = self.engine, self.engine.llm.llm_engine
        waiting, running = deque(range(len(self.requests))), {}
        engine.driver.canvases = self.canvases
        try:
            while waiting or running:
                while waiting and self._room(running.values(), waiting[0]):
                    slot = waiting.popleft()
                    name = str(next(engine.names))
                    vllm.add_request(name, *self._request(slot, name))
                    running[name] = slot
                for output in vllm.step():
                    if output.finished:
                        running.pop(output.request_id)
                if on_step is not None:
                    on_step()
        finally:
            if running:
                vllm.abort_request(list(running))
                vllm.step()
            engine.driver.canvases = None
        return self.results

    def advance_with(self, rows: Tensor, hidden: Tensor, starts: Tensor) -> tuple[list[bool], list[bool]]:
        """See `rlhub.engines.vllm_plugin.state.Advance`."""
        begin = torch.from_numpy(self.canvases.begin).to(rows.device)[rows]
        forward: Any = self.forward  # a `Lookup`
        forward.states, forward.place[rows] = hidden, starts - begin
        blocks = self.slots.block[rows]
        finished = set(self.advance(rows))
        for slot in finished:
            self.results[slot] = self.rollout(slot)
        ended = [slot in finished for slot in rows.tolist()]
        committed = self.forward.block_causal
        return [committed and done for done in (self.slots.block[rows] > blocks).tolist()], ended

    def _room(self, running: Sequence[int], slot: int) -> bool:
        """May this request join? vLLM would cut canvases that exceed the tokens of a step."""
        if len(running) >= self.engine.max_running:
            return False
        widths = self.canvases.width
        return sum(int(widths[other]) for other in running) + int(widths[slot]) <= self.engine.tokens_at_once

    def _request(self, slot: int, name: str):
        """The prompt and the parameters that vLLM gets."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        from rlhub.engines.vllm_plugin.state import SLOT

        canvases, begin, width = self.canvases, int(self.canvases.begin[slot]), int(self.canvases.width[slot])
        known = self.requests[slot].prompt_ids[:begin].tolist()
        prompt = TokensPrompt(prompt_token_ids=known)
        if not begin:  # its pages are shifted against vLLM's count, so they are not shared
            prompt = TokensPrompt(prompt_token_ids=[self.model.mask_id], cache_salt=name)
        return prompt, SamplingParams(
            max_tokens=int(canvases.end[slot]) - begin + width,
            stop_token_ids=[self.engine.driver.stop_id],
            ignore_eos=True,
            detokenize=False,
            extra_args={SLOT: slot} | ({"diffusion_canvas_length": width} if self.engine.layout == "full" else {}),
        )
