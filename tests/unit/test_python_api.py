"""The steps of a training loop that `rlhub` exports: gradients, numbers, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import rlhub
from rlhub import api
from rlhub.errors import RecipeError, UserError

CANVAS = {"length": 4, "steps": 4, "block_length": 4}
SIZE = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 24, "init_std": 0.3}


@pytest.fixture
def model() -> rlhub.Model:
    return rlhub.new_model(tokenizer=rlhub.task_tokenizer("sort", {}), **SIZE)


def graded(model: rlhub.Model, algorithm: rlhub.Algorithm) -> tuple[rlhub.Batch, rlhub.Credit, rlhub.Views]:
    rollouts = rlhub.generate(model, ["3 1", "3 1", "2 9", "2 9"], temperature=1.0, **CANVAS)
    batch = rlhub.make_batch(model, algorithm, rollouts, [1.0, 0.0, 0.25, 0.5], group_size=2)
    credit = algorithm.credit(batch)
    return batch, credit, rlhub.make_views(model, algorithm, batch, credit, seed=3)


def gradients(model: rlhub.Model) -> list[torch.Tensor]:
    made = [parameter.grad.clone() for parameter in model.network.parameters()]
    model.network.zero_grad()
    return made


def test_what_is_exported():
    assert rlhub.__all__ == api.__all__ == sorted(api.__all__)
    assert all(hasattr(rlhub, name) for name in rlhub.__all__)


def test_one_backward_and_two_passes_give_the_same_gradient(model):
    algorithm = rlhub.compose(views={"name": "coupled", "draws": 2}, objective="sequence_clip")
    batch, credit, views = graded(model, algorithm)
    algorithm.loss(algorithm.scores(rlhub.LogProbs(rlhub.token_log_probs(model, views)), views, batch, credit), credit)[0].backward()
    whole = gradients(model)
    with torch.no_grad():
        log_prob = rlhub.token_log_probs(model, views, max_tokens=8)
    coefficient, _, _ = algorithm.coefficients(rlhub.LogProbs(log_prob), views, batch, credit)
    (rlhub.token_log_probs(model, views, max_tokens=8) * coefficient.float()).sum().backward()
    for one, other in zip(whole, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert sum(float(one.abs().sum()) for one in whole) > 0


def test_a_block_causal_family_is_scored_in_its_blocks():
    """By the very draws of `log_likelihood`, which masks each block of the model given those before."""
    model = rlhub.new_model("sdar", seed=1)
    algorithm = rlhub.compose(advantage="constant", views={"name": "elbo", "draws": 4}, objective="policy_gradient", behavior="none")
    (written,) = rlhub.demonstrations(model, [[3, 4, 5]], [[6, 7, 8, 9, 10]])
    batch = rlhub.make_batch(model, algorithm, [written], [1.0])
    credit = algorithm.credit(batch)
    views = rlhub.make_views(model, algorithm, batch, credit, seed=7)
    value = algorithm.scores(rlhub.LogProbs(rlhub.token_log_probs(model, views)), views, batch, credit).policy.value
    expected = rlhub.log_likelihood(model, [3, 4, 5], written.completion_ids, draws=4, seed=7)
    assert value.item() == pytest.approx(expected.value, abs=1e-4)


def test_demonstrations_end_with_eos_and_count_alone(model):
    written = rlhub.demonstrations(model, ["3 1", "2"], ["1 3", "2"])
    assert [one.length for one in written] == [3, 2] and {int(one.completion_ids[-1]) for one in written} == {model.eos_id}
    assert model.decode(written[0]) == "1 3"
    batch = rlhub.make_batch(model, rlhub.compose(advantage="constant"), written, [1.0, 1.0])
    assert batch.rewards.shape == (2, 1) and batch.group.tolist() == [0, 1]


def test_a_failed_grade_gives_no_gradient(model):
    algorithm = rlhub.compose(objective="policy_gradient", behavior="none")
    rollouts = rlhub.generate(model, ["3 1"] * 3, temperature=1.0, **CANVAS)
    batch = rlhub.make_batch(model, algorithm, rollouts, [1.0, 0.0, rlhub.RewardResult(math.nan, "timeout")], group_size=3)
    assert algorithm.credit(batch).advantages.tolist() == [0.5, -0.5, 0.0] and batch.valid.tolist() == [True, True, False]


def test_logits_keep_a_gradient_where_asked(model):
    tokens = [[5, 3, model.mask_id]]
    assert not model.logits(tokens).requires_grad
    model.logits(tokens, gradient=True).logsumexp(-1).sum().backward()
    assert float(gradients(model)[0].abs().sum()) > 0


def test_a_saved_model_comes_back(model, tmp_path):
    again = rlhub.load_model(model.save(tmp_path / "model"))
    tokens = [[5, 3, model.mask_id]]
    assert torch.equal(again.logits(tokens), model.logits(tokens))
    assert again.tokenizer("3 1")["input_ids"] == model.tokenizer("3 1")["input_ids"]


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda model: rlhub.compose(objectve="dpo"), RecipeError, "objectve.*did you mean objective"),
        (lambda model: rlhub.compose(objective="sequence_clp"), RecipeError, "did you mean sequence_clip"),
        (lambda model: rlhub.compose(kl={"coeficient": 1}), RecipeError, "coeficient.*of kl.*did you mean coefficient"),
        (lambda model: rlhub.new_model("llada", d_mdel=3), RecipeError, "d_mdel.*did you mean d_model"),
        (lambda model: rlhub.new_model("lada"), RecipeError, "did you mean llada"),
        (lambda model: rlhub.demonstrations(model, ["1"], []), UserError, "1 prompts and 0 completions"),
        (lambda model: rlhub.make_batch(model, rlhub.compose(), [], []), UserError, "0 rollouts and 0 rewards"),
    ],
)
def test_mistakes_are_one_line(ask, error, words, model):
    with pytest.raises(error, match=words) as caught:
        ask(model)
    assert "\n" not in str(caught.value)
