"""Speed of the rollout engine against LLaDA's published `generate` procedure, on the same random weights.

    python benchmarks/rollout.py [--json] [--quick] [--repeats 5] [--only temperature_1] ...

The other side, `published_generate`, is a plain implementation of the published procedure at its published cost: every step runs all layers
and the head over all positions, draws float64 noise over [B, L, V] at temperature above 0, takes the softmax over all of it and one top-k a
row. Ours is `rlhub.engines.torch_engine` as a run uses it, with keyed noise on. Both sides run in this process on one thread in fp32,
alternating; times are process-CPU seconds and ratios the median over the repeats.

    temperature_0, temperature_1   the whole canvas on both sides
    early_0, early_1               our rows stop at a planted schedule, at 60 % of the canvas on average; the other side never stops
    dual_cache                     ours with `cache: dual` at temperature 0, an approximation
    block_causal                   a block-causal model: exact cache against recomputing the window up to the active block, head everywhere
    shares                         sampler bookkeeping and recorder as shares of the rollout's time, from timers around the model's calls
    memory                         peak bytes of arrays over the vocabulary, as a share of [B, L, V] in fp32
    agreement                      tokens of both sides at temperature 0, with the smallest margin of each row that differs; and the
                                   approximate caches against the exact mode at temperature 1, 4 rows: equal tokens, KL per position

Rows are made to stop by a wrapper around the network that lets EOS win at the last position of a row's planted block, and nowhere else;
which block is read off the prompt's first token. It adds no work to speak of.

Ends with status 1 when a ratio or a share is beyond its limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhub.config.schema import SamplerConfig
from rlhub.engines.agreement import agreement
from rlhub.engines.torch_engine import Engine
from rlhub.models import llada, sdar
from rlhub.networks.layers import rotary_tables, rotate
from rlhub.networks.layout import pack_layout
from rlhub.noise import Noise
from rlhub.types import Request, Rollout

AT_LEAST = {
    "temperature_0": 1.6,
    "temperature_1": 3.6,
    "early_0": 2.5,
    "early_1": 6.0,
    "dual_cache": 4.2,
    "block_causal": 6.0,
}
AT_MOST = {"bookkeeping_0": 0.05, "bookkeeping_1": 0.05, "recorder": 0.01, "peak_logits": 0.1}
NOISE = Noise(0)


@dataclass(frozen=True)
class Sizes:
    d_model: int = 512
    layers: int = 8
    heads: int = 8
    feed_forward: int = 1536
    vocabulary: int = 32000
    prompt: int = 128
    canvas: int = 128
    block: int = 32
    batch: int = 16
    steps: int = 16
    causal_batch: int = 8
    causal_canvas: int = 64
    causal_block: int = 16
    causal_steps: int = 8  # of a block
    repeats: int = 5


QUICK = Sizes(64, 2, 2, 192, 4000, 32, 32, 8, 8, 8, 4, 32, 8, 4, 2)

# ------------------------------------------------------------------------------------------------------------- the other side


def plain_logits(network: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, L, V] of a LLaDA network for tokens [B, L], all layers and the head at all positions."""
    config, layers = network.config, network.model["transformer"]
    batch, length = tokens.shape
    tables = rotary_tables(torch.arange(length), config.d_model // config.n_heads, config.rope_theta)

    def heads(hidden: Tensor, turned: bool) -> Tensor:
        split = hidden.view(batch, length, config.n_heads, -1)
        return (
            rotate(split.flatten(0, 1), tuple(part.repeat(batch, 1, 1) for part in tables)).view(split.shape) if turned else split
        ).transpose(1, 2)

    hidden = F.embedding(tokens, layers["wte"].weight)
    for block in layers["blocks"]:
        normed = block.attn_norm(hidden)
        query, key, value = heads(block.q_proj(normed), True), heads(block.k_proj(normed), True), heads(block.v_proj(normed), False)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(hidden.shape)
        hidden = hidden + block.attn_out(mixed)
        normed = block.ff_norm(hidden)
        hidden = hidden + block.ff_out(F.silu(block.ff_proj(normed)) * block.up_proj(normed))
    return layers["ff_out"](layers["ln_f"](hidden))


@torch.no_grad()
def published_generate(
    network: torch.nn.Module, prompts: Tensor, canvas: int, steps: int, block: int, temperature: float, margins: list[float] | None = None
) -> Tensor:
    """LLaDA's generation with low-confidence remasking (arXiv 2502.09992, appendix A.3), tokens [B, P] -> [B, canvas].

    The one departure: the mask token cannot be predicted, as in ours.

    Args:
        margins: receives, per row, the smallest margin of its decisions in nats; costs time.
    """
    batch, start = prompts.shape
    mask = network.mask_id
    tokens = torch.cat([prompts, torch.full((batch, canvas), mask)], 1)
    steps_per_block = steps // (canvas // block)
    generator = torch.Generator().manual_seed(0)
    smallest = torch.full((batch,), torch.inf)
    for number in range(steps):
        end = start + (number // steps_per_block + 1) * block
        masked = tokens == mask
        count = block // steps_per_block + (number % steps_per_block < block % steps_per_block)
        logits = plain_logits(network, tokens)
        probability = F.softmax(logits, dim=-1)
        logits[..., mask] = -torch.inf
        noised = logits
        if temperature > 0:
            wide = logits.to(torch.float64)
            noise = torch.rand(wide.shape, dtype=torch.float64, generator=generator)
            noised = wide.exp() / (-torch.log(noise)) ** temperature
        predicted = noised.argmax(-1)
        confidence = probability.gather(-1, predicted[..., None]).squeeze(-1)
        confidence[:, end:] = -torch.inf
        confidence = torch.where(masked, confidence, -torch.inf)
        if margins is not None:
            smallest = torch.minimum(smallest, _margin(logits, confidence, count))
        for row in range(batch):
            chosen = confidence[row].topk(count).indices
            tokens[row, chosen] = predicted[row, chosen]
    if margins is not None:
        margins += smallest.tolist()
    return tokens[:, start:]


def _margin(logits: Tensor, confidence: Tensor, count: int) -> Tensor:
    """[B], the smallest gap of a row's decisions in nats: best to second token, last chosen to first left position."""
    best = logits.topk(2, dim=-1).values
    gaps = torch.where(confidence > -torch.inf, best[..., 0] - best[..., 1], torch.inf).amin(1)
    ranked = confidence.clamp_min(0).log().topk(count + 1, dim=1).values
    return torch.minimum(gaps, ranked[:, count - 1] - ranked[:, count])


@torch.no_grad()
def window_generate(network: torch.nn.Module, prompts: Tensor, canvas: int, steps_per_block: int) -> Tensor:
    """Block decoding of a block-causal model without a cache: each step runs over everything up to the active block, head everywhere."""
    batch, start = prompts.shape
    block, mask = network.profile.block_length, network.mask_id
    tokens = prompts
    for _ in range(canvas // block):
        tokens = torch.cat([tokens, torch.full((batch, block), mask)], 1)
        end = tokens.shape[1]
        for step in range(steps_per_block):
            count = block // steps_per_block + (step < block % steps_per_block)
            logits = network.head(network.denoise(tokens.flatten(), pack_layout([end] * batch))).view(batch, end, -1)
            probability = F.softmax(logits, dim=-1)
            logits[..., mask] = -torch.inf
            predicted = logits.argmax(-1)
            confidence = probability.gather(-1, predicted[..., None]).squeeze(-1)
            confidence = torch.where(tokens == mask, confidence, -torch.inf)
            for row in range(batch):
                chosen = confidence[row].topk(count).indices
                tokens[row, chosen] = predicted[row, chosen]
    return tokens[:, start:]


# -------------------------------------------------------------------------------------------------------------------- our side


class Wrapper:
    """A network with something around `denoise` and `head`; everything else is the network's."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


class Timed(Wrapper):
    """Adds up the process-CPU seconds of the model's calls."""

    seconds = 0.0

    def denoise(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._timed(self.network.denoise, *args, **kwargs)

    def head(self, *args: Any) -> Tensor:
        return self._timed(self.network.head, *args)

    def _timed(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        began = time.process_time()
        result = call(*args, **kwargs)
        self.seconds += time.process_time() - began
        return result


class Planted(Wrapper):
    """Lets EOS win at the last position of the block that the prompt's first token names, counted from 1, and nowhere else."""

    def __init__(self, network: torch.nn.Module, sizes: Sizes) -> None:
        super().__init__(network)
        self.sizes = sizes
        self.ends = torch.zeros(0, dtype=torch.bool)  # of the hidden states that have not been through the head yet

    def denoise(self, tokens: Tensor, layout: Any, targets: Tensor, cache: Any = None) -> Tensor:
        row = torch.searchsorted(layout.row_offsets.long(), targets, right=True) - 1
        start = layout.row_offsets.long()[row]
        last = self.sizes.prompt + (tokens[start] - FIRST_BLOCK_TOKEN + 1) * self.sizes.block - 1
        self.ends = torch.cat([self.ends, targets - start == last])
        return self.network.denoise(tokens, layout, targets=targets, cache=cache)

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.network.head(hidden)
        ends, self.ends = self.ends[: len(hidden)], self.ends[len(hidden) :]
        logits[:, self.eos_id] = torch.where(ends, 1e4, -torch.inf)
        return logits


FIRST_BLOCK_TOKEN = 2  # of the planted prompts: token 2 ends in the first block


def planted_blocks(sizes: Sizes) -> list[int]:
    """The block in which each row ends, counted from 1: spread over all blocks, at 60 % of the canvas on average or just above."""
    blocks = sizes.canvas // sizes.block
    spread = [1 + row * blocks // sizes.batch for row in range(sizes.batch)]  # mean (blocks + 1) / 2
    row = 0
    while sum(spread) < 0.6 * blocks * sizes.batch:
        if spread[row] < blocks:
            spread[row] += 1
        row = (row + 1) % sizes.batch
    return spread


class PeakBytes(TorchDispatchMode):
    """Peak bytes of live tensors whose last axis is the vocabulary; the network's own weights do not count."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.vocabulary, self.live, self.peak = network.vocab_size, {}, 0
        self.weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self.live and key not in self.weights:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


# ------------------------------------------------------------------------------------------------------------------- measuring


class Bench:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        config = llada.Config(
            d_model=sizes.d_model,
            n_layers=sizes.layers,
            n_heads=sizes.heads,
            mlp_hidden_size=sizes.feed_forward,
            vocab_size=sizes.vocabulary,
        )
        self.network = llada.build(config).initialize(torch.Generator().manual_seed(0)).eval()
        self.prompts = torch.from_numpy(np.random.default_rng(0).integers(2, sizes.vocabulary, (sizes.batch, sizes.prompt)))

    def settings(self, temperature: float, **changes: Any) -> SamplerConfig:
        sizes = self.sizes
        base = SamplerConfig("low_confidence", sizes.canvas, sizes.steps, sizes.block, temperature, early_stop="off")
        return replace(base, **changes)

    def ours(self, settings: SamplerConfig, network: Any = None, prompts: Tensor | None = None) -> list[Rollout]:
        prompts = self.prompts if prompts is None else prompts
        requests = [Request(uid, uid, row.numpy().astype(np.int32)) for uid, row in enumerate(prompts)]
        return Engine(network or self.network).generate(requests, settings, NOISE)

    def published(self, temperature: float) -> Tensor:
        sizes = self.sizes
        return published_generate(self.network, self.prompts, sizes.canvas, sizes.steps, sizes.block, temperature)

    def temperatures(self, temperature: float, names: tuple[str, str], wanted: set[str]) -> dict[str, Any]:
        """Ours with and without early stop and, at temperature 0, with the dual cache, against one run of the published procedure."""
        planted = self.prompts.clone()
        planted[:, 0] = torch.tensor(planted_blocks(self.sizes)) - 1 + FIRST_BLOCK_TOKEN
        stopping = self.settings(temperature, early_stop="fill_eos")
        sides = {
            names[0]: lambda: self.ours(self.settings(temperature)),
            names[1]: lambda: self.ours(stopping, Planted(self.network, self.sizes), planted),
        }
        if temperature == 0:
            sides["dual_cache"] = lambda: self.ours(self.settings(0.0, cache="dual"))
        sides = {name: side for name, side in sides.items() if name in wanted}
        return self.alternate("published", lambda: self.published(temperature), sides)

    def block_causal(self) -> dict[str, Any]:
        sizes = self.sizes
        config = sdar.Config(
            hidden_size=sizes.d_model,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            head_dim=sizes.d_model // sizes.heads,
            intermediate_size=sizes.feed_forward,
            vocab_size=sizes.vocabulary,
            block_size=sizes.causal_block,
        )
        network = sdar.build(config).initialize(torch.Generator().manual_seed(0)).eval()
        prompts = self.prompts[: sizes.causal_batch]
        steps = sizes.causal_steps * sizes.causal_canvas // sizes.causal_block
        settings = SamplerConfig("low_confidence", sizes.causal_canvas, steps, sizes.causal_block, 0.0, early_stop="off")
        found = self.alternate(
            "window",
            lambda: window_generate(network, prompts, sizes.causal_canvas, sizes.causal_steps),
            {"block_causal": lambda: self.ours(settings, network, prompts)},
        )
        window = window_generate(network, prompts, sizes.causal_canvas, sizes.causal_steps).numpy()
        tokens = np.stack([rollout.completion_ids for rollout in self.ours(settings, network, prompts)])
        found["block_causal"]["rows_equal"] = f"{int((window == tokens).all(1).sum())} of {len(tokens)}"
        return found

    def alternate(self, other: str, baseline: Callable[[], Any], sides: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Median ratio of the baseline's time to each side's, all run in turn."""
        times: dict[str, list[float]] = {name: [] for name in (other, *sides)}
        for repeat in range(self.sizes.repeats):
            for name, call in {other: baseline, **sides}.items():
                began = time.process_time()
                call()
                times[name].append(time.process_time() - began)
                say(f"repeat {repeat + 1}: {name} {times[name][-1]:.2f} s")
        return {
            name: {
                "ratio": median(there / here for there, here in zip(times[other], times[name], strict=True)),
                f"{other}_seconds": median(times[other]),
                "our_seconds": median(times[name]),
            }
            for name in sides
        }

    def shares(self) -> dict[str, Any]:
        """Time outside the model's calls, and what recording adds to it, as shares of the rollout's time; medians over the repeats.

        What recording adds is measured with a stub in place of the network: the same calls and shapes, and no forward to drown it in.
        """
        found: dict[str, list[float]] = {}
        for repeat in range(self.sizes.repeats):
            for temperature in (0.0, 1.0):
                timed = Timed(self.network)
                began = time.process_time()
                self.ours(self.settings(temperature), timed)
                total = time.process_time() - began
                found.setdefault(f"bookkeeping_{temperature:g}", []).append((total - timed.seconds) / total)
            stub = Stub(self.network)
            for name, records in (("recorder", ["entropy", "order", "edits", "fallback"]), ("recorder_with_predictions", ["predictions"])):
                seconds = []
                for kept in ([], records):
                    timed = Timed(stub)
                    began = time.process_time()
                    self.ours(self.settings(1.0, records=kept), timed)
                    seconds.append(time.process_time() - began - timed.seconds)
                found.setdefault(name, []).append((seconds[1] - seconds[0]) / total)
            say(f"repeat {repeat + 1}: " + ", ".join(f"{name} {values[-1]:.2%}" for name, values in found.items()))
        return {name: {"share": median(values)} for name, values in found.items()}

    def memory(self) -> dict[str, Any]:
        sizes = self.sizes
        naive = sizes.batch * (sizes.prompt + sizes.canvas) * sizes.vocabulary * 4
        with PeakBytes(self.network) as peak:
            self.ours(self.settings(1.0))
        return {"peak_logits": {"share": peak.peak / naive, "megabytes": peak.peak / 2**20, "naive_megabytes": naive / 2**20}}

    def agreement(self) -> dict[str, Any]:
        sizes, margins = self.sizes, []
        theirs = published_generate(self.network, self.prompts, sizes.canvas, sizes.steps, sizes.block, 0.0, margins).numpy()
        ours = np.stack([rollout.completion_ids for rollout in self.ours(self.settings(0.0))])
        equal = (theirs == ours).all(1)
        requests = [Request(uid, uid, row.numpy().astype(np.int32)) for uid, row in enumerate(self.prompts[:4])]
        caches = {
            f"{cache}_cache_agreement": asdict(agreement(self.network, requests, self.settings(1.0, cache=cache), NOISE))
            for cache in ("prefix", "dual")
        }
        return caches | {
            "agreement": {
                "rows_equal": f"{int(equal.sum())} of {len(equal)}",
                "smallest_margin": min(margins),
                "margins_of_rows_that_differ": [margin for margin, same in zip(margins, equal, strict=True) if not same],
            }
        }


class Stub(Wrapper):
    """The network's calls with their shapes, without the forward: hidden states are zero, logits a fixed random row."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__(network)
        self.row = torch.randn(network.vocab_size, generator=torch.Generator().manual_seed(0))

    def denoise(self, tokens: Tensor, layout: Any, targets: Tensor, cache: Any = None) -> Tensor:
        return torch.zeros(len(targets), 1)

    def head(self, hidden: Tensor) -> Tensor:
        return self.row.expand(len(hidden), -1).clone()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failures(results: dict[str, Any]) -> list[str]:
    low = [
        f"{name} {results[name]['ratio']:.2f}, at least {limit:g}"
        for name, limit in AT_LEAST.items()
        if name in results and results[name]["ratio"] < limit
    ]
    high = [
        f"{name} {results[name]['share']:.3f}, at most {limit:g}"
        for name, limit in AT_MOST.items()
        if name in results and results[name]["share"] > limit
    ]
    return low + high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs; no limits")
    parser.add_argument("--only", nargs="+", help="names from the list above")
    for size in fields(Sizes):
        parser.add_argument("--" + size.name.replace("_", "-"), type=int)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    sizes = QUICK if options["quick"] else Sizes()
    sizes = replace(sizes, **{size.name: options[size.name] for size in fields(Sizes) if options[size.name] is not None})
    bench, results = Bench(sizes), {}
    names = ["temperature_0", "early_0", "dual_cache", "temperature_1", "early_1", "block_causal", "shares", "memory", "agreement"]
    wanted = set(options["only"] or names)
    if unknown := wanted - set(names):
        parser.error(f"no such measurement {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    if wanted & {"temperature_0", "early_0", "dual_cache"}:
        results |= bench.temperatures(0.0, ("temperature_0", "early_0"), wanted)
    if wanted & {"temperature_1", "early_1"}:
        results |= bench.temperatures(1.0, ("temperature_1", "early_1"), wanted)
    for name in ("block_causal", "shares", "memory", "agreement"):
        if name in wanted:
            results |= getattr(bench, name)()
    if options["json"]:
        print(json.dumps({"sizes": asdict(sizes), "results": results}))
    else:
        for name, values in results.items():
            print(
                name, *(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()), sep="  "
            )
    if not options["quick"] and (failed := failures(results)):
        say("; ".join(failed))
        sys.exit(1)


if __name__ == "__main__":
    main()
