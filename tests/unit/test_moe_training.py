"""The learner on mixtures of experts: auxiliary losses exact in any cut, statistics, frozen routers, routing replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhub.algorithm.batching import make_batch, micro_batches
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, RouterConfig, SamplerConfig
from rlhub.engines.torch_engine import Engine
from rlhub.errors import RecipeError
from rlhub.models import llada2, llada_moe
from rlhub.networks.experts import record_routing, routers
from rlhub.noise import Noise
from rlhub.types import Request, RewardResult, Rollout
from workers.learner import Learner

FAMILIES = {"llada_moe": llada_moe, "llada2": llada2}
MASK = 14


def batch_of(size: int = 8):
    rng = np.random.default_rng(0)
    steps, none = np.arange(6, dtype=np.int16), np.zeros(6, np.float32)
    rollouts = [
        Rollout(
            uid=number,
            group_uid=number // 4,
            prompt_ids=rng.integers(0, 12, 3).astype(np.int32),
            completion_ids=rng.integers(0, 12, 6).astype(np.int32),
            length=6,
            unmask_step=steps,
            logp_sample=none,
            logp_model=none,
            policy_version=np.zeros(6, np.int32),
            num_forwards=6,
        ).graded(RewardResult(float(rng.integers(0, 3))))
        for number in range(size)
    ]
    return make_batch(rollouts, scored_length="canvas")


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    family = FAMILIES[request.param]
    network = family.build(family.Config.from_published(family.TINY)).initialize(torch.Generator().manual_seed(3))
    save_network(network, tmp_path / "model")
    return tmp_path / "model"


def learner_on(
    folder, router: RouterConfig, updates: int = 1, tokens: int = 4096, learning_rate: float = 0.01, parts: dict | None = None
) -> Learner:
    learner = Learner(str(folder), LearnerConfig(backend="torch", micro_batch_tokens=tokens), 0, router=router)
    algorithm = AlgorithmConfig(**(parts or {"views": {"name": "elbo", "draws": 2}}), updates=updates)
    learner.begin(algorithm, OptimizerConfig(learning_rate=learning_rate, warmup_steps=0, max_grad_norm=1e9, schedule="constant"), 8)
    return learner


def gradient_of(learner: Learner) -> torch.Tensor:
    """Of the first update, before the optimizer."""
    batch = learner.algorithm.credited(batch_of())
    learner._update(batch, learner.make_views(batch)[0], None, None)
    return torch.cat([parameter.grad.flatten().double() for parameter in learner.network.parameters()])


def auxiliary_of(record, config: RouterConfig) -> torch.Tensor:
    """The documented terms, from one forward over everything."""
    terms = []
    for routing in record:
        num_experts = routing.rule.num_experts
        share = torch.tensor([(routing.experts == expert).double().mean() for expert in range(num_experts)])
        odds = routing.logits.exp() if routing.rule.score == "softmax" else routing.logits.sigmoid()
        balance = num_experts * (share * (odds / odds.sum(1, keepdim=True)).mean(0)).sum()
        terms.append(config.load_balance * balance + config.z * (routing.logits.exp().sum(1).log() ** 2).mean())
    return sum(terms) / len(terms)


def test_auxiliary_gradient_is_exact_however_the_views_are_cut(folder):
    config = RouterConfig(load_balance=0.5, z=0.2)
    one_pass = gradient_of(learner_on(folder, config))
    for tokens in (1, 40):
        cut = gradient_of(learner_on(folder, config, tokens=tokens))
        assert (cut - one_pass).norm() <= 1e-5 * one_pass.norm()

    learner = learner_on(folder, config)
    batch, network = batch_of(), load_network(folder)
    (views,) = learner.make_views(learner.algorithm.credited(batch))
    (run,) = micro_batches(views, 10**9)
    with record_routing(network) as record:
        micro_batch_log_probs(network, views, run)
    gradient = torch.autograd.grad(auxiliary_of(record, config), list(network.parameters()), allow_unused=True)
    wanted = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in zip(network.parameters(), gradient, strict=True)]
    )
    plain = gradient_of(learner_on(folder, RouterConfig(load_balance=0.0, z=0.0)))
    assert (one_pass - plain - wanted).norm() <= 1e-5 * one_pass.norm() and wanted.norm() > 0.1 * plain.norm()


def test_statistics_are_reported_by_noise_level(folder):
    def step(router: RouterConfig, **options) -> dict[str, float]:
        learner = learner_on(folder, router, **options)
        return learner.step(learner.algorithm.credited(batch_of()))

    metrics = step(RouterConfig())
    for key in ("router/load_balance", "router/z", "router/load_max_over_mean"):
        assert metrics[key] > 0
    assert any(key.startswith("router/level_") for key in metrics) and metrics["router/load_max_over_mean"] >= 1
    cut = step(RouterConfig(), tokens=30)
    assert {key: cut[key] for key in cut if key.startswith("router/")} == pytest.approx(
        {key: metrics[key] for key in metrics if key.startswith("router/")}, rel=1e-5
    )
    silent = step(RouterConfig(statistics=False))
    assert not any(key.startswith("router/") for key in silent)


def test_load_balance_evens_the_load(folder):
    loads = []
    for weight in (0.0, 1.0):
        learner = learner_on(folder, RouterConfig(load_balance=weight, z=0.0))
        for _ in range(15):
            metrics = learner.step(learner.algorithm.credited(batch_of()))
        loads.append(metrics["router/load_max_over_mean"])
    assert loads[1] < 0.9 * loads[0]


def test_frozen_routers_stay(folder):
    before = [router.weight.clone() for router in routers(load_network(folder))]
    for freeze in (True, False):
        learner = learner_on(folder, RouterConfig(freeze=freeze))
        learner.step(learner.algorithm.credited(batch_of()))
        after = [router.weight for router in routers(learner.network)]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) == freeze


class Watching(Learner):
    """Keeps which experts each forward used, by micro-batch in order."""

    def _forward(self, views, run, routes):
        log_prob, record = super()._forward(views, run, routes)
        self.__dict__.setdefault("seen", []).append([routing.experts.clone() for routing in record])
        return log_prob, record


def test_replay_keeps_the_experts_of_the_weights_that_began_the_batch(folder):
    """With the same views in both updates the second would choose other experts, and chooses the first's under replay."""
    changed = {}
    for replay in (False, True):
        learner = learner_on(folder, RouterConfig(replay=replay), updates=2, learning_rate=0.1)
        learner.__class__ = Watching
        learner.algorithm.config.fresh_views = "step"
        learner.step(learner.algorithm.credited(batch_of()))
        began, *_, last = learner.seen
        changed[replay] = any((one != other).any() for one, other in zip(began, last, strict=True))
    assert changed == {False: True, True: False}


def test_a_learner_with_the_rollouts_weights_replays_the_rollouts_experts(tmp_path):
    """Every token's, in each state of the trajectory. The last layer computes no more than the scored positions, which differ."""
    layers, steps = 3, 6
    config = llada_moe.Config.from_published(llada_moe.TINY | {"num_hidden_layers": layers})
    save_network(llada_moe.build(config).initialize(torch.Generator().manual_seed(3)), tmp_path)
    network, rng = load_network(tmp_path), np.random.default_rng(0)
    settings = SamplerConfig(length=steps, steps=steps, block_length=steps, early_stop="off")
    rollouts, chosen = [], {}
    for number in range(8):
        request = Request(number, number // 4, rng.integers(0, 12, 3).astype(np.int32))
        with record_routing(network) as record:
            (rollout,) = Engine(network).generate([request], settings, Noise(0))
        rollouts.append(rollout.graded(RewardResult(float(number % 3))))
        for step in range(steps):
            chosen[number, step] = [routing.experts for routing in record[layers * step : layers * step + layers - 1]]

    parts = {"views": {"name": "trajectory"}, "likelihood": {"name": "trajectory"}, "objective": {"name": "token_clip"}}
    learner = learner_on(tmp_path, RouterConfig(replay=True), updates=2, tokens=1, learning_rate=0.1, parts=parts)
    batch = learner.algorithm.credited(make_batch(rollouts, scored_length="canvas"))

    def agreement() -> float:
        views, routes = learner.make_views(batch)[0], {}
        learner._all_log_probs(views, routes)
        assert len(routes) == views.num_rows == 8 * steps
        pairs = [zip(routes[run], chosen[int(views.sample[run.first_row]), int(views.step[run.first_row])], strict=False) for run in routes]
        return float(np.mean([torch.equal(ours.long(), theirs) for pair in pairs for ours, theirs in pair]))

    assert agreement() == 1.0
    learner.step(batch)
    assert agreement() < 1.0


def test_router_settings_that_cannot_act_are_refused(tiny):
    with pytest.raises(RecipeError, match=r"model\.router\.replay: must be false with algorithm\.updates=1"):
        tiny("model.router.replay=true", "algorithm.updates=1")
    with pytest.raises(RecipeError, match=r"model\.router\.z: must be 0 or more, got -1"):
        tiny("model.router.z=-1")
    assert tiny("model.router.replay=true", "algorithm.updates=2").model.router.replay
