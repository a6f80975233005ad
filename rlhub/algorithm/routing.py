"""What training does with the routers of a mixture of experts: auxiliary losses, statistics, freezing.

Two terms are added to the loss of every algorithm, each averaged over the layers that route:

    load balance    E sum_i f_i P_i                      Switch Transformer, arXiv 2101.03961, Eq. 4; 1 when the load is even
    z               mean_t (logsumexp_i logit_ti)^2      ST-MoE, arXiv 2202.08906, Eq. 5

f_i is the share of expert i among all choices (a token has K), P_i the mean over tokens of its probability: the softmax, or the sigmoid
scores divided by their sum. The tokens are all that a layer routes in the views of one update, prompt, visible and masked ones alike,
over all micro-batches and learners (balance over the global batch: arXiv 2501.11873). f has no gradient, so with f known the gradient is a
sum over tokens: it is exact in two passes and does not depend on how the views are cut into micro-batches or shared among learners.
Where a forward computes its last layer only for the scored positions, that layer's tokens are those.

Masked diffusion shows routers inputs from nearly all masked to nearly none, and the load shifts with that level (LLaDA-MoE, arXiv
2509.24389); statistics are therefore also kept by the share of a row that is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlhub.config.schema import RouterConfig
from rlhub.networks.experts import Routing, Rule, routers

LEVELS = 4  # equal bins of the masked share


def freeze_routers(network: nn.Module) -> None:
    """Stop training the routers of a network."""
    for router in routers(network):
        router.weight.requires_grad_(False)


def masked_share(tokens: Tensor, row_offsets: Tensor, mask_id: int) -> Tensor:
    """float32 [T], for each packed token [T] the share of masked tokens in its row."""
    lengths = row_offsets.long().diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
    masked = torch.zeros(len(lengths), device=tokens.device).index_add_(0, row, (tokens == mask_id).float())
    return (masked / lengths)[row]


def router_probabilities(routing: Routing) -> Tensor:
    """fp32 [T, E] that sum to 1 over the experts."""
    if routing.rule.score == "softmax":
        return routing.logits.softmax(-1)
    scores = routing.logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def once(record: Sequence[Routing], num_tokens: int, num_targets: int) -> list[Routing]:
    """The record of a forward in which a token that is computed alone, as two equal rows, counts once."""
    alone = [num_tokens == 1] * (len(record) - 1) + [1 in (num_tokens, num_targets)]
    return [
        replace(routing, logits=routing.logits[:1], experts=routing.experts[:1]) if single and len(routing.logits) == 2 else routing
        for routing, single in zip(record, alone, strict=True)
    ]


def router_sums(record: Sequence[Routing], level: Tensor, targets: Tensor) -> Tensor:
    """float64 [layers, (LEVELS + 1) * E + 1]: what losses and statistics need of a forward; add them up over micro-batches and learners.

    Per layer the choices of each expert by level, the sum over tokens of its probability, and the sum of the squared logsumexp.

    Args:
        level: [T], masked share of each packed token's row.
        targets: int64 [M], scored positions in the packed axis: what the last layer routes when the forward is told of them.
    """
    sums = []
    for routing in record:
        own = level if len(level) == len(routing.logits) else level[targets.sort().values]
        level_of = (own * LEVELS).long().clamp(max=LEVELS - 1)
        num_experts = routing.rule.num_experts
        load = (level_of[:, None] * num_experts + routing.experts).flatten().bincount(minlength=LEVELS * num_experts)
        squared = routing.logits.detach().logsumexp(-1).double().square().sum()
        sums.append(torch.cat([load.double(), router_probabilities(routing).detach().double().sum(0), squared[None]]))
    return torch.stack(sums)


def auxiliary_loss(record: Sequence[Routing], total: Tensor, config: RouterConfig) -> Tensor:
    """The part of the auxiliary terms that the tokens of `record` contribute, weighted as `config` says, with gradient.

    Args:
        total: sums over the whole update, of which these tokens are a part; see `router_sums`.
    """
    terms = []
    for routing, sums in zip(record, total, strict=True):
        load, _, _, num_tokens = _parts(sums, routing.rule)
        share = (load.sum(0) / load.sum()).to(routing.logits)
        balance = routing.rule.num_experts * (router_probabilities(routing).sum(0) * share).sum()
        squared = routing.logits.logsumexp(-1).square().sum()
        terms.append((config.load_balance * balance + config.z * squared) / num_tokens)
    return torch.stack(terms).mean()


def router_metrics(total: Tensor, rule: Rule) -> dict[str, float]:
    """Means over layers of what `router_sums` added up.

    Keys:
        `router/load_balance`, `router/z`: the auxiliary terms before their weights.
        `router/load_max_over_mean`: load of the busiest expert over the mean load; 1 is even, E / K is the worst.
        `router/level_<q>/load_max_over_mean`: the same over tokens of rows whose masked share is in the q-th quarter (1 to 4).
        `router/level_<q>/load_shift`: total variation between that quarter's load and the whole load, 0 to 1.
    Quarters without tokens are left out.
    """
    num_experts = rule.num_experts
    layers = [_parts(sums, rule) for sums in total]
    share = torch.stack([load.sum(0) / load.sum() for load, *_ in layers])
    mean_probability = torch.stack([probability / num_tokens for _, probability, _, num_tokens in layers])
    metrics = {
        "router/load_balance": (num_experts * (share * mean_probability).sum(-1)).mean().item(),
        "router/z": torch.stack([squared / num_tokens for _, _, squared, num_tokens in layers]).mean().item(),
        "router/load_max_over_mean": (num_experts * share.amax(-1)).mean().item(),
    }
    for quarter in range(LEVELS):
        load = torch.stack([load[quarter] for load, *_ in layers])
        if (load.sum(-1) > 0).all():
            own = load / load.sum(-1, keepdim=True)
            metrics[f"router/level_{quarter + 1}/load_max_over_mean"] = (num_experts * own.amax(-1)).mean().item()
            metrics[f"router/level_{quarter + 1}/load_shift"] = (0.5 * (own - share).abs().sum(-1)).mean().item()
    return metrics


def _parts(sums: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load [LEVELS, E], probability [E], squared logsumexp and number of tokens of one layer's sums."""
    load, probability, squared = torch.split(sums, [LEVELS * rule.num_experts, rule.num_experts, 1])
    return load.view(LEVELS, rule.num_experts), probability, squared[0], load.sum() / rule.top_k
