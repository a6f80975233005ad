"""A training loop of your own, with nothing but what `rlhub` exports: supervised steps, then policy gradient, on a toy task.

    python examples/custom_training_loop.py

A tiny LLaDA of random weights learns to sort three digits from demonstrations of which only a part is right; then it is rewarded for
right answers. Every line of the loop is here, so every line can be changed: the credit, the noise, the loss, the optimizer.
"""

from __future__ import annotations

import argparse

import torch

import rlhub

DIGITS, GROUP = 3, 8
CANVAS = {"length": DIGITS + 1, "steps": DIGITS + 1, "block_length": DIGITS + 1}  # the answer and its end


def accuracy(model: rlhub.Model, task, seed: int = 0) -> float:
    """Share of the held-out problems that are answered right, greedily."""
    examples = [task.example(index) for index in range(task.size)]
    rollouts = rlhub.generate(model, [example.prompt for example in examples], seed=seed, **CANVAS)
    return sum(map(is_right, (model.decode(one) for one in rollouts), examples)) / task.size


def is_right(completion: str, example) -> float:
    return float(completion.split() == example.columns["answer"].split())


def step(model: rlhub.Model, algorithm: rlhub.Algorithm, optimizer: torch.optim.Optimizer, batch: rlhub.Batch, seed: int) -> float:
    """One update on a graded batch: credit, views, log-probs, scores, loss, gradient; returns the loss."""
    credit = algorithm.credit(batch)
    views = rlhub.make_views(model, algorithm, batch, credit, seed=seed)
    log_prob = rlhub.token_log_probs(model, views)
    scores = algorithm.scores(rlhub.LogProbs(log_prob), views, batch, credit)
    loss, _ = algorithm.loss(scores, credit)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main(supervised_steps: int, policy_steps: int) -> tuple[float, float]:
    """Train; returns held-out accuracy after the supervised steps and at the end."""
    options = {"digits": DIGITS, "correct_fraction": 0.4, "test_size": 64}
    train, test = (rlhub.load_task("sort", options, split, seed=0) for split in ("train", "test"))
    model = rlhub.new_model(tokenizer=rlhub.task_tokenizer("sort", options), d_model=64, n_layers=2, n_heads=4, mlp_hidden_size=128)

    supervised = rlhub.compose(advantage="constant", views={"name": "elbo", "draws": 1}, objective="policy_gradient", behavior="none")
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=2e-3)
    for number in range(supervised_steps):
        examples = [train.example(64 * number + row) for row in range(64)]
        written = rlhub.demonstrations(model, [one.prompt for one in examples], [one.demonstration for one in examples])
        step(model, supervised, optimizer, rlhub.make_batch(model, supervised, written, [1.0] * 64), seed=number)
    before = accuracy(model, test)
    print(f"after {supervised_steps} supervised steps {before:.1%} of {test.size} held-out problems are right")

    policy = rlhub.compose(advantage="group_mean", views={"name": "coupled", "draws": 2}, objective="policy_gradient", behavior="none")
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=5e-4)
    for number in range(policy_steps):
        examples = [train.example(16 * number + row // GROUP) for row in range(16 * GROUP)]
        rollouts = rlhub.generate(model, [one.prompt for one in examples], temperature=1.0, seed=number, **CANVAS)
        rewards = [is_right(model.decode(rollout), one) for rollout, one in zip(rollouts, examples, strict=True)]
        step(model, policy, optimizer, rlhub.make_batch(model, policy, rollouts, rewards, group_size=GROUP), seed=10_000 + number)
        if number % 10 == 0:
            print(f"policy step {number}: mean reward {sum(rewards) / len(rewards):.3f}")
    after = accuracy(model, test)
    print(f"after {policy_steps} policy steps {after:.1%}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--supervised-steps", type=int, default=150)
    parser.add_argument("--policy-steps", type=int, default=60)
    arguments = parser.parse_args()
    main(arguments.supervised_steps, arguments.policy_steps)
