"""Routing rules against loops, sparse experts against dense ones, and what training does with routers."""

from __future__ import annotations

import pytest
import torch

from rlhub.algorithm.routing import LEVELS, auxiliary_loss, freeze_routers, masked_share, router_metrics, router_sums
from rlhub.config.schema import RouterConfig
from rlhub.networks.experts import Router, Rule, SparseMLP, choose_experts, expert_scores, expert_weights, mix_experts, record_routing

SOFTMAX = Rule(num_experts=8, top_k=3)
GROUPED = Rule(num_experts=8, top_k=3, score="sigmoid", num_groups=4, kept_groups=2, normalize=True, scale=2.5)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def route(logits: torch.Tensor, rule: Rule, bias: torch.Tensor | None = None) -> list[dict[int, float]]:
    """Expert -> weight of each token."""
    scores = expert_scores(logits, rule)
    experts = choose_experts(scores, rule, bias)
    weights = expert_weights(scores, experts, rule)
    return [dict(zip(*pair, strict=True)) for pair in zip(experts.tolist(), weights.tolist(), strict=True)]


def weights_close(found: dict[int, float], wanted: dict[int, float]) -> bool:
    return found.keys() == wanted.keys() and all(found[expert] == pytest.approx(wanted[expert], rel=1e-5) for expert in wanted)


def test_softmax_routing_does_not_renormalise():
    logits = draw(20, 8)
    for found, row in zip(route(logits, SOFTMAX), logits.double(), strict=True):
        share = (row.exp() / row.exp().sum()).tolist()
        wanted = {expert: share[expert] for expert in sorted(range(8), key=lambda expert: -share[expert])[:3]}
        assert weights_close(found, wanted) and sum(found.values()) < 0.99


def test_grouped_routing_limits_groups_and_uses_the_bias_for_selection_only():
    logits, bias = draw(200, 8, seed=1), draw(8, seed=2)
    unlimited = unbiased = 0
    for found, row in zip(route(logits, GROUPED, bias), logits.double(), strict=True):
        score = (1 / (1 + (-row).exp())).tolist()
        wanted_score = [one + float(shift) for one, shift in zip(score, bias, strict=True)]
        groups = sorted(range(4), key=lambda group: -(wanted_score[2 * group] + wanted_score[2 * group + 1]))[:2]
        allowed = [expert for expert in range(8) if expert // 2 in groups]
        chosen = sorted(allowed, key=lambda expert: -wanted_score[expert])[:3]
        total = sum(score[expert] for expert in chosen)
        assert weights_close(found, {expert: 2.5 * score[expert] / total for expert in chosen})
        unlimited += set(chosen) != set(sorted(range(8), key=lambda expert: -wanted_score[expert])[:3])
        unbiased += set(chosen) != set(route(row[None].float(), GROUPED)[0])
    assert unlimited > 20 and unbiased > 20, "the case would not notice a missing group limit or bias"


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"top_k": 9}, "num_experts_per_tok"), ({"num_groups": 3}, "n_group"), ({"num_groups": 4, "kept_groups": 5}, "topk")],
)
def test_impossible_rules_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        Rule(**{"num_experts": 8, "top_k": 2} | changes)


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    scores = expert_scores(draw(13, 8), SOFTMAX)
    experts = choose_experts(scores, SOFTMAX)
    return {
        "hidden": draw(13, 6, seed=3),
        "experts": experts,
        "weights": expert_weights(scores, experts, SOFTMAX),
        "gate": draw(8, 10, 6, seed=4),
        "up": draw(8, 10, 6, seed=5),
        "down": draw(8, 6, 10, seed=6),
    }


def dense(hidden, experts, weights, gate, up, down):
    """Every expert on every token, weighted by a mostly zero matrix."""
    inner = torch.einsum("td,efd->tef", hidden, gate)
    inner = inner / (1 + (-inner).exp()) * torch.einsum("td,efd->tef", hidden, up)
    matrix = torch.zeros(len(hidden), len(gate), dtype=weights.dtype).scatter(1, experts, weights)
    return torch.einsum("tef,edf,te->td", inner, down, matrix)


def test_sparse_experts_equal_dense_ones_with_gradient(layer):
    leaves = {name: value.requires_grad_() for name, value in layer.items() if name != "experts"}
    sparse = mix_experts(**layer)
    double = {name: value.detach().double().requires_grad_() for name, value in leaves.items()}
    wanted = dense(experts=layer["experts"], **double)
    torch.testing.assert_close(sparse.double(), wanted, rtol=1e-5, atol=1e-5)
    pull = draw(*sparse.shape, seed=7)
    sparse.backward(pull)
    wanted.backward(pull.double())
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), double[name].grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rule", [SOFTMAX, GROUPED], ids=["softmax", "grouped"])
def test_a_token_does_not_depend_on_its_batch(rule):
    """Bit for bit, alone or among others, also where an expert has a single token."""
    mlp = SparseMLP(32, 48, rule, bias=True, shared_inner=64)
    for number, tensor in enumerate(mlp.parameters()):
        tensor.data = draw(*tensor.shape, seed=number) / 4
    hidden = draw(64, 32)
    with torch.no_grad():
        whole = mlp(hidden)
        for rows in ([8], [5, 6], [9, 3, 40, 22, 1, 0, 63], list(range(63, -1, -1))):
            assert torch.equal(mlp(hidden[rows]), whole[rows])


# ---------------------------------------------------------------------------------------------------- records, replay, losses


def make_router(seed: int, rule: Rule = SOFTMAX) -> Router:
    router = Router(6, rule)
    router.weight.data = draw(rule.num_experts, 6, seed=seed)
    return router


def test_replay_repeats_choices_under_other_weights():
    hidden, old, new = draw(50, 6), make_router(1), make_router(2)
    with record_routing(old) as before:
        old(hidden)
    assert (new(hidden)[0] != before[0].experts).any()
    with record_routing(new, [routing.experts for routing in before]) as after:
        experts, weights = new(hidden)
    assert torch.equal(experts, before[0].experts) and torch.equal(after[0].experts, experts)
    own = (hidden.double() @ new.weight.double().T).softmax(-1).gather(1, experts)
    torch.testing.assert_close(weights.double(), own, rtol=1e-5, atol=1e-6)
    weights.sum().backward()
    assert new.weight.grad.abs().sum() > 0
    assert new.record is None and new.replay is None
    with pytest.raises(ValueError, match="49 tokens"), record_routing(new, [before[0].experts]):
        new(hidden[1:])
    with pytest.raises(ValueError, match="2 recorded layers"), record_routing(new, [before[0].experts] * 2):
        pass


@pytest.mark.parametrize("rule", [SOFTMAX, GROUPED], ids=["softmax", "sigmoid"])
def test_auxiliary_terms_follow_their_formulas_however_the_tokens_are_cut(rule):
    """Value against loops in float64; the gradients of parts add up to the gradient of the whole."""
    router, hidden, config = make_router(3, rule), draw(24, 6), RouterConfig(load_balance=0.3, z=0.2)
    level, none = torch.linspace(0, 1, 24), torch.zeros(0, dtype=torch.int64)

    def sums_and_loss(rows: slice, total: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        with record_routing(router) as record:
            router(hidden[rows])
        sums = router_sums(record, level[rows], none)
        return sums, auxiliary_loss(record, sums if total is None else total, config)

    total, loss = sums_and_loss(slice(None), None)
    logits = hidden.double() @ router.weight.detach().double().T
    chosen = [set(row) for row in choose_experts(expert_scores(logits, rule), rule).tolist()]
    balance = 0.0
    for expert in range(8):
        share = sum(expert in row for row in chosen) / (24 * rule.top_k)
        odds = logits.exp() if rule.score == "softmax" else 1 / (1 + (-logits).exp())
        balance += 8 * share * (odds[:, expert] / odds.sum(1)).mean().item()
    z = (logits.exp().sum(1).log() ** 2).mean().item()
    assert loss.item() == pytest.approx(0.3 * balance + 0.2 * z, rel=1e-5)
    metrics = router_metrics(total, rule)
    assert metrics["router/load_balance"] == pytest.approx(balance, rel=1e-5) and metrics["router/z"] == pytest.approx(z, rel=1e-5)

    (whole,) = torch.autograd.grad(loss, router.weight)
    cuts = [slice(0, 1), slice(1, 10), slice(10, 24)]
    parts = [torch.autograd.grad(sums_and_loss(rows, total)[1], router.weight)[0] for rows in cuts]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(sums_and_loss(rows, None)[0] for rows in cuts), total)


def test_an_even_load_has_balance_one_and_a_collapsed_one_more():
    even = torch.full((LEVELS + 1, 4), 6.0).double()
    total = torch.cat([even.flatten(), torch.zeros(1).double()])[None]
    metrics = router_metrics(total, Rule(4, 4))
    assert metrics["router/load_balance"] == pytest.approx(6 * 4 / 24) and metrics["router/load_max_over_mean"] == pytest.approx(1)
    collapsed = torch.zeros(LEVELS + 1, 4).double()
    collapsed[0, 0], collapsed[2, 1], collapsed[LEVELS] = 30, 10, torch.tensor([40, 0, 0, 0])
    metrics = router_metrics(torch.cat([collapsed.flatten(), torch.zeros(1).double()])[None], Rule(4, 1))
    assert metrics["router/load_balance"] == pytest.approx(4 * 0.75) and metrics["router/load_max_over_mean"] == pytest.approx(3)
    assert metrics["router/level_1/load_shift"] == pytest.approx(0.25) and metrics["router/level_3/load_shift"] == pytest.approx(0.75)
    assert metrics["router/level_3/load_max_over_mean"] == pytest.approx(4) and "router/level_2/load_shift" not in metrics


def test_levels_are_the_masked_share_of_rows():
    tokens = torch.tensor([9, 9, 1, 2, 9, 1, 1])
    share = masked_share(tokens, torch.tensor([0, 4, 5, 7]), mask_id=9)
    assert share.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.0]


def test_frozen_routers_take_no_gradient():
    mlp = SparseMLP(6, 5, SOFTMAX)
    for number, tensor in enumerate(mlp.parameters()):
        tensor.data = draw(*tensor.shape, seed=number)
    freeze_routers(mlp)
    mlp(draw(4, 6)).sum().backward()
    assert mlp.gate.weight.grad is None and mlp.experts.up_proj.grad.abs().sum() > 0
