"""Fifteen published algorithms as YAML blocks: each composes, takes an update, and has one gradient however it is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlhub.algorithm.batching import MicroBatch, micro_batches, shard_rows
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.scoring import token_log_probs
from rlhub.config.recipe import load_recipe
from rlhub.networks.layout import slice_layout
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.types import NEVER, Batch

RECIPES = Path(__file__).parents[2] / "recipes" / "algorithms"
MASK, STEPS, LENGTH = 2, 4, 4
PROFILE = Profile(mask_id=MASK, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="")

# Overrides make the parts bite on a canvas of four tokens.
ALGORITHMS = {
    "espo": [],
    "vrpo": [],
    "diffu_grpo": [],
    "coupled_grpo": [],
    "spg": [],
    "justgrpo": [],
    "tracerl": ["algorithm.views.shrink=2"],
    "wd1": [],
    "stabledrl": [],
    "bgpo": [],
    "mdpo": ["algorithm.views.top=2"],
    "online_dpo": [],
    "ipo": [],
    "kto": [],
    "simpo": [],
}


class Tiny(nn.Module):
    """A fp64 denoiser over two tokens and a mask: each position sees itself and the weighted mean of its row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.token, self.position, self.inner, self.mix, self.out = weight(3, 5), weight(8, 5), weight(5, 5), weight(5, 5), weight(5, 2)

    def denoise(self, tokens, layout, targets=None):
        embedded = self.token[tokens.long()] + self.position[layout.position_ids.long()]
        row = torch.repeat_interleave(torch.arange(len(layout.lengths)), layout.lengths)
        shape = (len(layout.lengths), embedded.shape[1])
        mean = torch.zeros(shape, dtype=embedded.dtype).index_add(0, row, embedded) / layout.lengths[:, None]
        hidden = torch.tanh(embedded @ self.inner + (mean @ self.mix)[row])
        return hidden if targets is None else hidden[targets]

    def head(self, hidden, target_rows=None):
        return (hidden if target_rows is None else hidden[target_rows]) @ self.out


def compose(name: str) -> Algorithm:
    return Algorithm.compose(load_recipe(RECIPES / f"{name}.yaml", ALGORITHMS[name]).algorithm)


def make_batch(algorithm: Algorithm) -> Batch:
    """Three prompts with four completions each: one grade is invalid, one group is all equal, one position was never filled."""
    generator = np.random.default_rng(0)
    prompts, members = 3, 4
    size = prompts * members
    rewards = generator.integers(0, 3, (prompts, members)).astype(float)
    rewards[0] = [1.0, 0.0, np.nan, 2.0]
    rewards[2] = 1.0
    unmask_step = [generator.permutation([0, 1, 2, 2]).astype(np.int16) for _ in range(size)]
    unmask_step[3] = np.array([1, 0, NEVER, 2], dtype=np.int16)
    length = generator.integers(2, LENGTH + 1, size)
    step_rewards = None
    if algorithm.config.advantage["name"] == "step_difference":
        step_rewards = generator.integers(0, 3, (prompts, members, STEPS)).astype(float)
        step_rewards[0, 2] = np.nan
    return Batch(
        uid=np.arange(size, dtype=np.uint64),
        group=np.repeat(np.arange(prompts), members),
        prompts=[generator.integers(0, 2, 1 + sample // members).astype(np.int32) for sample in range(size)],
        completions=[generator.integers(0, 2, LENGTH).astype(np.int32) for _ in range(size)],
        response_length=length,
        scored_length=length if algorithm.config.length == "response" else np.full(size, LENGTH),
        rewards=rewards,
        member=np.tile(np.arange(members), prompts),
        unmask_step=unmask_step,
        logp_model=[np.log(generator.uniform(0.1, 0.9, LENGTH)).astype(np.float32) for _ in range(size)],
        block_length=2,
        step_rewards=step_rewards,
    )


def log_probs(model, views, run=None):
    """[m] log-probs in fp64 with gradient, of one micro-batch or of all rows; `rlhub.algorithm.scoring` does the same in fp32."""
    run = run or MicroBatch(0, views.num_rows, 0, len(views.score_row))
    begin, end = int(views.layout.row_offsets[run.first_row]), int(views.layout.row_offsets[run.last_row])
    hidden = model.denoise(views.tokens[begin:end], slice_layout(views.layout, run.first_row, run.last_row))
    scores = slice(run.first_score, run.last_score)
    logits = model.head(hidden, views.target_rows[scores] - begin)
    return logits.log_softmax(-1).gather(1, views.score_target[scores, None]).squeeze(1)


def one_pass(algorithm, model, views, batch, credit, proximal, reference):
    loss, _ = algorithm.loss(algorithm.scores(LogProbs(log_probs(model, views), proximal, reference), views, batch, credit), credit)
    return loss, torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def two_pass(algorithm, model, views, batch, credit, proximal, reference, max_tokens, num_learners):
    """The learners' gradient: gathered log-probs, one derivative of the loss, then a backward pass per micro-batch, summed."""
    shards = [micro_batches(views, max_tokens, *rows) for rows in shard_rows(views, num_learners)]
    with torch.no_grad():
        gathered = torch.cat([log_probs(model, views, run) for runs in shards for run in runs])
    coefficient, _, metrics = algorithm.coefficients(LogProbs(gathered, proximal, reference), views, batch, credit)
    total = 0
    for runs in shards:
        own = 0
        for run in runs:
            objective = (log_probs(model, views, run) * coefficient[run.first_score : run.last_score]).sum()
            own = own + torch.cat([part.flatten() for part in torch.autograd.grad(objective, list(model.parameters()))])
        total = total + own
    return total, metrics


@pytest.fixture(params=list(ALGORITHMS))
def setting(request):
    """(algorithm, model, views, batch, credit, proximal, reference) at an update where every compared policy is another one."""
    algorithm = compose(request.param)
    batch = make_batch(algorithm)
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(run_seed=1), update=0, profile=PROFILE)
    with torch.no_grad():
        model = Tiny(seed=0)
        others = [Tiny(seed=0), Tiny(seed=0)]
        for seed, other in enumerate(others):
            for parameter, change in zip(other.parameters(), Tiny(seed=seed + 1).parameters(), strict=True):
                parameter += 0.05 * change
        proximal = log_probs(others[0], views) if algorithm.config.behavior == "recompute" else None
        reference = log_probs(others[1], views) if algorithm.needs_reference else None
    return algorithm, model, views, batch, credit, proximal, reference


@pytest.mark.parametrize("first_update", [True, False])
def test_two_passes_of_any_split_equal_one(setting, first_update):
    algorithm, model, views, batch, credit, proximal, reference = setting
    policies = (None if first_update else proximal, reference)
    loss, expected = one_pass(algorithm, model, views, batch, credit, *policies)
    assert expected.isfinite().all() and expected.norm() > 1e-3
    for max_tokens, num_learners in ((1, 1), (10**9, 1), (16, 2), (1, 3)):
        gradient, metrics = two_pass(algorithm, model, views, batch, credit, *policies, max_tokens, num_learners)
        assert (gradient - expected).norm() <= 1e-10 * expected.norm()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_an_update_lowers_the_loss(setting):
    algorithm, model, views, batch, credit, proximal, reference = setting
    if algorithm.config.behavior == "detach":
        proximal = log_probs(model, views).detach()
    before, gradient = one_pass(algorithm, model, views, batch, credit, proximal, reference)
    rate = 1e-4 / gradient.norm()
    offset = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * gradient[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
    after, _ = one_pass(algorithm, model, views, batch, credit, proximal, reference)
    if algorithm.config.objective["name"] == "self_normalized":  # its detached weights move too, so the loss is no potential
        assert after != before
    else:
        drop = (before - after).item()
        assert drop == pytest.approx((rate * gradient.norm() ** 2).item(), rel=0.05)


def test_invalid_samples_have_no_gradient(setting):
    algorithm, model, views, batch, credit, proximal, reference = setting
    invalid = torch.from_numpy(~batch.valid)
    assert invalid.sum() == 1
    coefficient, _, _ = algorithm.coefficients(LogProbs(log_probs(model, views), proximal, reference), views, batch, credit)
    assert (coefficient[invalid[views.score_sample]] == 0).all()
    assert (coefficient != 0).any()


def test_cost_and_scores_are_as_declared(setting):
    algorithm, model, views, batch, *_ = setting
    module, config = algorithm.views
    rows = torch.bincount(views.sample, minlength=len(batch))
    assert (rows <= module.rows_per_sample(config, STEPS)).all()
    completions = np.stack(batch.completions)
    assert (views.score_target.numpy() == completions[views.score_sample.numpy(), views.score_token.numpy()]).all()
    assert (views.score_token < torch.from_numpy(batch.scored_length)[views.score_sample]).all()
    assert (views.tokens[views.target_rows] == MASK).all()
    torch.testing.assert_close(token_log_probs(model, views, 64).double(), log_probs(model, views).detach(), atol=1e-6, rtol=0)


def test_views_do_not_depend_on_the_batch_they_are_cut_from(setting):
    """The rows of one sample alone equal its rows among the others."""
    algorithm, _, views, batch, credit, *_ = setting
    if algorithm.config.views["name"] == "trajectory":
        pytest.skip("no noise")
    alone = Batch(
        uid=batch.uid[5:6],
        group=np.zeros(1, dtype=np.int64),
        prompts=batch.prompts[5:6],
        completions=batch.completions[5:6],
        response_length=batch.response_length[5:6],
        scored_length=batch.scored_length[5:6],
        rewards=np.ones((1, 1)),
        member=np.zeros(1, dtype=np.int64),
        block_length=2,
    )
    own = algorithm.make_views(alone, credit, Noise(run_seed=1), update=0, profile=PROFILE)
    offsets = views.layout.row_offsets.long()
    first = int((views.sample < 5).sum())
    assert own.tokens.tolist() == views.tokens[offsets[first] : offsets[first + own.num_rows]].tolist()
    assert own.score_weight.tolist() == views.score_weight[views.score_sample == 5].tolist()


EXACT_ROLLOUTS = ["algorithm.behavior=rollout", "algorithm.length=canvas", "sampler.early_stop=off"]


def test_log_probs_of_the_rollout_serve_as_behavior():
    """Left to right they are the exact ones: recorded under the same weights, every ratio is 1."""
    algorithm = Algorithm.compose(load_recipe(RECIPES / "justgrpo.yaml", EXACT_ROLLOUTS).algorithm)
    batch = make_batch(algorithm)
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(run_seed=1), update=0, profile=PROFILE)
    log_prob = log_probs(Tiny(seed=0), views).detach()
    for row in batch.logp_model:
        row[:] = np.nan
    for sample, token, value in zip(views.score_sample.tolist(), views.score_token.tolist(), log_prob.tolist(), strict=True):
        batch.logp_model[sample][token] = value
    _, scores, metrics = algorithm.coefficients(LogProbs(log_prob), views, batch, credit)
    torch.testing.assert_close(scores.behavior.value, scores.policy.value, atol=1e-6, rtol=0)
    assert metrics["ratio/min"] == pytest.approx(1, abs=1e-5) and metrics["ratio/max"] == pytest.approx(1, abs=1e-5)
