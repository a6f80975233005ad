"""The loops, written once for laptop and cluster.

    prompts -> generators -> rollouts -> reward workers -> graded groups
                                                             |
                               learner makes views -> scorers: log-probs of the reference
                                                             v
        generators <- weights with receipts <-------------- learners

`run_pairs` has no generators: preference pairs come from data, and the reference's estimates from a cache that the scorers fill once.

`run_online` waits for each of these in turn at `max_staleness: 0`: a step trains on rollouts of the weights it began with. At k the
generators work up to k batches ahead of the learners (docs/asynchrony.md). `run_sft` keeps one batch ahead of the learners. Every step
but those is a pure function of the weights and its number, so a killed run continues from its last checkpoint as if nothing had
happened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rlhub.algorithm.batching import make_batch
from rlhub.algorithm.health import rollout_metrics, staleness_metrics
from rlhub.algorithm.pairs import PairOrder, pair_order
from rlhub.noise import ONLINE
from rlhub.training.documents import pack_documents
from rlhub.training.grading import grade, grade_states, shuffle_grades
from rlhub.training.reference import open_reference
from rlhub.training.rollouts import Issued, RolloutQueue, issue
from rlhub.training.session import Session
from rlhub.training.supervised import cut_at_random, demonstration_batch, family_weight, supervised_algorithm, supervised_batch
from rlhub.types import Batch


def run_sft(session: Session) -> None:
    """Supervised training on demonstrations or documents, by default on the ELBO per token, through the same learner as everything else."""
    recipe, crew = session.recipe, session.crew
    config = recipe.sft
    algorithm = supervised_algorithm(config, family_weight(session.model_path))
    session.begin("sft", algorithm, config.optimizer, config.steps)
    demonstrations, upcoming = _demonstrations(session), None
    for step in session.steps("sft", config.steps, config.eval_every):
        batch = upcoming or demonstrations(step)
        futures = [crew.runtime.submit(learner, "step", batch) for learner in crew.learners]
        if step < config.steps:
            upcoming = demonstrations(step + 1)
        with session.span("learn"):
            metrics, *_ = crew.collect(futures)
        session.finish_step(metrics, num_samples=len(batch))


def _demonstrations(session: Session) -> Callable[[int], Batch]:
    """The supervised batch of a step: packed documents, of preference data the chosen responses that fit, else demonstrations."""
    recipe, eos_id = session.recipe, session.tokenizer.eos_token_id
    config, canvas = recipe.sft, recipe.sampler.length
    if recipe.task.name == "documents":
        packed = pack_documents(session.train_task, session.tokenizer, config.packing, canvas, session.noise)
        return lambda step: cut_at_random(packed.batch(step, config.batch_size), config.random_length, session.noise, step)
    if recipe.task.name != "preferences":
        return lambda step: supervised_batch(
            demonstration_batch(session.train_task, session.tokenizer, recipe, step), config, eos_id, canvas, session.noise, step
        )
    good = session.pairs.train.demonstrations()
    order = PairOrder(len(good), config.batch_size, 0, session.noise)

    def batch(step: int) -> Batch:
        epoch, which = order.step(step)
        return supervised_batch(good.batch(which, epoch), config, eos_id, canvas, session.noise, step)

    return batch


def run_pairs(session: Session) -> None:
    """Preference optimization on pairs, or on labelled samples, from data."""
    recipe, crew, pairs = session.recipe, session.crew, session.pairs.train
    session.begin("pairs", recipe.algorithm, recipe.learner.optimizer, recipe.run.steps * recipe.algorithm.updates)
    order = pair_order(recipe, len(pairs))
    reference = open_reference(session, order)
    for step in session.steps("pairs", recipe.run.steps, recipe.run.eval_every):
        epoch, which = order.step(step)
        batch = pairs.batch(which, order.plan(epoch))
        with session.span("score"):
            estimates, counts = reference.estimates(which, batch) if reference else ([], {})
        with session.span("learn"):
            metrics = crew.learn("step", crew.runtime.put(batch), None, *estimates)
        session.follow_policy("pairs", step)
        session.finish_step(metrics | counts | {"data/epoch": epoch}, num_samples=len(batch))


def run_online(session: Session) -> None:
    """Reinforcement learning on rollouts of the current policy, or of one up to `max_staleness` versions older."""
    recipe, crew = session.recipe, session.crew
    algorithm = recipe.algorithm
    session.begin("online", algorithm, recipe.learner.optimizer, recipe.run.steps * algorithm.updates)
    queue = RolloutQueue(crew, partial(_issue_step, session), recipe.sampler, algorithm.max_staleness, recipe.run.steps)
    for step in session.steps("online", recipe.run.steps, recipe.run.eval_every):
        with session.span("generate"):
            issued, rollouts = queue.batch(step)
            if algorithm.max_staleness:
                session.row |= staleness_metrics(rollouts, crew.version)
        with session.span("reward"):
            rollouts, texts = grade(crew, issued, rollouts, session.tokenizer, recipe.reward_pool.batch_size)
            rollouts = grade_states(crew, issued, rollouts, session.tokenizer, recipe)
            trained = shuffle_grades(rollouts, session.noise, step) if recipe.task.shuffle_rewards else rollouts
        batch = crew.runtime.put(
            make_batch(
                trained,
                scored_length=algorithm.length,
                block_length=recipe.sampler.block_length,
                on_invalid=algorithm.on_invalid,
            )
        )
        views, reference = None, []
        if session.needs_reference:
            with session.span("score"):
                views = crew.runtime.submit(crew.learners[0], "make_views", batch)
                ask = ("score", views) if algorithm.shared_noise else ("estimate", algorithm, recipe.run.seed, batch)
                count = len(crew.scorers)
                reference = [crew.runtime.submit(scorer, *ask, index, count) for index, scorer in enumerate(crew.scorers)]
                crew.collect(reference)
        with session.span("replay"):
            replayed = session.check_replay(step, rollouts)
        with session.span("learn"):
            metrics = crew.learn("step", batch, views, *reference)
        if not recipe.weights.in_flight:
            with session.span("generate"):
                crew.generators.settle()
        with session.span("sync"):
            session.publish(step)
        session.finish_step(metrics | replayed | rollout_metrics(rollouts, session.tokenizer.eos_token_id), num_samples=len(rollouts))
        session.keep_rollouts(step, issued, rollouts, texts)


def _issue_step(session: Session, step: int) -> Issued:
    """The requests of an online step; no two steps share a prompt row or a uid."""
    algorithm = session.recipe.algorithm
    prompts, completions = algorithm.prompts_per_step, algorithm.completions_per_prompt
    return issue(session.train_task, session.tokenizer, ONLINE, step, (step - 1) * prompts, prompts, completions)
