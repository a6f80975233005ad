"""Mixture-of-experts layers: routing rules as pure functions, exact sparse computation, and a record of what the routers did.

Every token goes through its own top-k experts, whatever the load (no capacity, nothing dropped), and its output does not depend on what
else is in the batch. The weights of a layer's experts are one tensor per projection, so that optimizers, ZeRO and weight sync see three
tensors and not hundreds; checkpoints hold one tensor per expert under its published name (`expert_places`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.networks.layers import enough_rows, whole_vectors

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Rule:
    """How a router chooses and weighs experts.

    Attributes:
        score: `softmax` over the experts, or `sigmoid` of each.
        num_groups, kept_groups: only experts of the `kept_groups` best of `num_groups` equal groups can be chosen; a group is as good as
            the sum of its two best selection scores.
        normalize: divide the weights of the chosen experts by their sum.
        scale: factor of the weights.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    num_groups: int = 1
    kept_groups: int = 1
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts * self.kept_groups // self.num_groups:
            raise ValueError(f"num_experts_per_tok={self.top_k} must be between 1 and the experts of the kept groups")
        if self.num_experts % self.num_groups or (self.num_groups > 1 and self.num_experts < 2 * self.num_groups):
            raise ValueError(f"num_experts={self.num_experts} must be a multiple of n_group={self.num_groups}, two or more in each group")
        if not 1 <= self.kept_groups <= self.num_groups:
            raise ValueError(f"topk_group={self.kept_groups} must be between 1 and n_group={self.num_groups}")


def expert_scores(logits: Tensor, rule: Rule) -> Tensor:
    """fp32 [T, E] from router logits [T, E]."""
    logits = logits.float()
    return logits.softmax(-1) if rule.score == "softmax" else whole_vectors(torch.sigmoid, logits)


def choose_experts(scores: Tensor, rule: Rule, bias: Tensor | None = None) -> Tensor:
    """int64 [T, K] ascending: the experts of each token, from scores [T, E].

    `bias` [E] is added for the selection only (DeepSeek-V3, arXiv 2412.19437, Eq. 16; LLaDA2, arXiv 2512.15745); it never enters weights.
    """
    wanted = scores.detach() if bias is None else scores.detach() + bias.float()
    if rule.num_groups > 1:
        grouped = wanted.unflatten(-1, (rule.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(rule.kept_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        wanted = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    return wanted.topk(rule.top_k, dim=-1).indices.sort(-1).values


def expert_weights(scores: Tensor, experts: Tensor, rule: Rule) -> Tensor:
    """fp32 [T, K], weights of the chosen experts [T, K], from scores [T, E]."""
    weights = scores.gather(-1, experts)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scale


def mix_experts(hidden: Tensor, experts: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[T, D] -> [T, D]: the weighted sum of each token's experts, `down(silu(gate(x)) * up(x))`.

    Tokens are sorted by expert and each expert runs once on all of its tokens; sums are taken per token in the order of `experts`, so a
    token's output is the same in any batch.

    Args:
        experts, weights: [T, K].
        gate, up: [E, F, D]; down: [E, D, F].
    """
    num_tokens, top_k = experts.shape
    if not num_tokens:
        return hidden
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=len(gate)).tolist()
    pieces = zip(hidden[order // top_k].split(counts), gate.unbind(), up.unbind(), down.unbind(), strict=True)
    outputs = torch.cat([_swiglu(tokens, *weight) for tokens, *weight in pieces if len(tokens)])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    outputs = outputs[place].unflatten(0, (num_tokens, top_k)).float()
    return sum(weights[:, k, None] * outputs[:, k] for k in range(top_k)).to(hidden.dtype)


def _swiglu(tokens: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    enough = enough_rows(tokens)
    return F.linear(whole_vectors(F.silu, F.linear(enough, gate)) * F.linear(enough, up), down)[: len(tokens)]


@dataclass(frozen=True)
class Routing:
    """What one router did in a forward: logits fp32 [T, E] (with gradient when enabled) and the experts [T, K] of each token."""

    logits: Tensor
    experts: Tensor
    rule: Rule


class Router(nn.Module):
    """Chooses experts; its tensors are `weight` [E, D] and, where the family has one, the buffer `expert_bias` [E]."""

    def __init__(self, width: int, rule: Rule, bias: bool = False) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(rule.num_experts, width))
        self.register_buffer("expert_bias", torch.zeros(rule.num_experts) if bias else None)
        self.record: list[Routing] | None = None
        self.replay: Tensor | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> experts int64 [T, K] and their weights fp32 [T, K]."""
        logits = F.linear(enough_rows(hidden.float()), self.weight.float())[: len(hidden)]
        scores = expert_scores(logits, self.rule)
        experts = choose_experts(scores, self.rule, self.expert_bias) if self.replay is None else self.replay.to(hidden.device).long()
        if experts.shape != (len(hidden), self.rule.top_k):
            raise ValueError(f"replayed experts have shape {tuple(experts.shape)}, the layer routes {len(hidden)} tokens")
        if self.record is not None:
            self.record.append(Routing(logits, experts, self.rule))
        return experts, expert_weights(scores, experts, self.rule)


class Experts(nn.Module):
    """The routed experts of a layer: parameters `gate_proj`, `up_proj` [E, F, D] and `down_proj` [E, D, F]; see `expert_places`."""

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return mix_experts(hidden, experts, weights, self.gate_proj, self.up_proj, self.down_proj)


def expert_places(layers: Iterable[int], num_experts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Where the published tensors of single experts lie in the network's: name -> (name of the stacked tensor, index in it)."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (f"model.layers.{layer}.mlp.experts.{name}", (expert,))
        for layer in layers
        for expert in range(num_experts)
        for name in PROJECTIONS
    }


def initialize_experts(network: Network, num_layers: int) -> Network:
    """Scale freshly drawn ways down of the experts by 1 / sqrt(2 num_layers), as those of dense layers are."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Experts):
                module.down_proj.mul_((2 * num_layers) ** -0.5)
    return network


class SwiGLU(nn.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))` (Shazeer 2020), under the names that the inclusionAI checkpoints use."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(whole_vectors(F.silu, self.gate_proj(hidden)) * self.up_proj(hidden))


class SparseMLP(nn.Module):
    """Routed experts and, where `shared_inner` > 0, one that every token goes through."""

    def __init__(self, width: int, inner: int, rule: Rule, *, bias: bool = False, shared_inner: int = 0) -> None:
        super().__init__()
        self.gate = Router(width, rule, bias)
        self.experts = Experts(rule.num_experts, width, inner)
        self.shared_experts = SwiGLU(width, shared_inner) if shared_inner else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        mixed = self.experts(hidden, *self.gate(hidden))
        return mixed if self.shared_experts is None else mixed + self.shared_experts(enough_rows(hidden))[: len(hidden)]


def routers(network: nn.Module) -> list[Router]:
    """The routers of a network in the order of its layers; none for a dense network."""
    return [module for module in network.modules() if isinstance(module, Router)]


@contextmanager
def record_routing(network: nn.Module, replay: Sequence[Tensor] = ()) -> Iterator[list[Routing]]:
    """Record what every router does within the context, one entry per router and forward, in the order of layers.

    Args:
        replay: experts [T, K] for each router, chosen before, which are used again instead of a choice of its own: the rows must be those
            of the forward that chose. Weights are computed from the present logits, so gradients flow as usual (routing replay as in
            GSPO, arXiv 2507.18071, and R3, arXiv 2510.11370).

    Example:
        >>> with record_routing(network) as old:                                              # doctest: +SKIP
        ...     network.denoise(tokens, layout)
        >>> with record_routing(later_network, [routing.experts for routing in old]) as new:  # doctest: +SKIP
        ...     later_network.denoise(tokens, layout)
    """
    found = routers(network)
    if replay and len(replay) != len(found):
        raise ValueError(f"{len(replay)} recorded layers cannot be replayed by {len(found)} routers")
    record: list[Routing] = []
    for number, router in enumerate(found):
        router.record = record
        router.replay = replay[number] if replay else None
    try:
        yield record
    finally:
        for router in found:
            router.record = router.replay = None
