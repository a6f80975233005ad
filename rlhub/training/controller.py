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

from collections.abc import Callable, Sequence
from functools import partial

from rlhub.algorithm.batching import make_batch
from rlhub.algorithm.health import rollout_metrics, staleness_metrics
from rlhub.algorithm.pairs import PairOrder, pair_order
from rlhub.config.tasks import task_kind
from rlhub.phases import Phase
from rlhub.training.documents import pack_documents
from rlhub.training.grading import grade, grade_states, shuffle_grades
from rlhub.training.reference import open_reference
from rlhub.training.rollouts import Issued, RolloutQueue, issue
from rlhub.training.session import Session, check_gradient
from rlhub.training.supervised import cut_at_random, demonstration_batch, family_weight, supervised_algorithm, supervised_batch
from rlhub.types import Batch, Rollout, Views
from workers.learner import Reference
from workers.runtimes.runtime import Future


def run_sft(session: Session) -> None:
    """Supervised training on demonstrations or documents, by default on the ELBO per token, through the same learner as everything else."""
    recipe, crew = session.recipe, session.crew
    config = recipe.sft
    parts = supervised_algorithm(config, family_weight(session.model_path))
    algorithm = session.begin(Phase.SFT, parts, config.optimizer, config.steps, config.eval_every)
    demonstrations, upcoming = _demonstrations(session), None
    session.record_start()
    for step in session.remaining_steps():
        record = session.open_step(step)
        batch = upcoming or demonstrations(step)
        learning = crew.learners.begin_step(crew.runtime.put(algorithm.credited(batch)))
        upcoming = demonstrations(step + 1) if step < config.steps else None  # while the learners work
        with session.span("learn"):
            metrics = crew.learners.finish_step(learning)
        check_gradient(metrics)
        record.add(metrics)
        record.add(session.costs(len(batch)))
        if session.evaluates(step):
            if crew.generators.handles:
                record.add(session.publish(step))
            record.add(session.evaluate())
        session.log(record)
        if session.saves(step):
            session.save(step)
        if session.stop.requested:
            raise KeyboardInterrupt


def _demonstrations(session: Session) -> Callable[[int], Batch]:
    """The supervised batch of a step: packed documents, of preference data the chosen responses that fit, else demonstrations."""
    recipe, eos_id = session.recipe, session.tokenizer.eos_token_id
    config, canvas = recipe.sft, recipe.sampler.length
    if task_kind(recipe) == "documents":
        packed = pack_documents(session.train_task, session.tokenizer, config.packing, canvas, session.noise)
        return lambda step: cut_at_random(packed.batch(step, config.batch_size), config.random_length, session.noise, step)
    if task_kind(recipe) != "preferences":
        return lambda step: supervised_batch(
            demonstration_batch(session.train_task, session.tokenizer, recipe, step), config, eos_id, canvas, session.noise, step
        )
    good = session.preferences.train.demonstrations()
    order = PairOrder(len(good), config.batch_size, 0, session.noise)

    def batch(step: int) -> Batch:
        epoch, which = order.step(step)
        return supervised_batch(good.batch(which, epoch), config, eos_id, canvas, session.noise, step)

    return batch


def run_pairs(session: Session) -> None:
    """Preference optimization on pairs, or on labelled samples, from data."""
    recipe, crew, pairs = session.recipe, session.crew, session.preferences.train
    algorithm = session.begin(Phase.PAIRS, recipe.algorithm, recipe.learner.optimizer, recipe.run.steps, recipe.run.eval_every)
    order = pair_order(recipe, len(pairs))
    reference = open_reference(session, pairs, order)
    session.record_start()
    for step in session.remaining_steps():
        record = session.open_step(step)
        epoch, which = order.step(step)
        batch = algorithm.credited(pairs.batch(which, order.plan(epoch)))
        with session.span("score"):
            estimates, counts = reference.estimates(which, batch) if reference else ([], {})
        with session.span("learn"):
            metrics = crew.learners.step(crew.runtime.put(batch), None, estimates)
        check_gradient(metrics)
        if session.renews_reference(step):
            record.add(session.publish(step))
            crew.copy_reference()
        record.add({**metrics, **counts, "data/epoch": epoch})
        record.add(session.costs(len(batch)))
        if session.evaluates(step):
            if crew.generators.handles:
                record.add(session.publish(step))
            record.add(session.evaluate())
        session.log(record)
        if session.saves(step):
            session.save(step)
        if session.stop.requested:
            raise KeyboardInterrupt


def run_online(session: Session) -> None:
    """Reinforcement learning on rollouts of the current policy, or of one up to `max_staleness` versions older."""
    recipe, crew, tokenizer = session.recipe, session.crew, session.tokenizer
    config = recipe.algorithm
    algorithm = session.begin(Phase.ONLINE, config, recipe.learner.optimizer, recipe.run.steps, recipe.run.eval_every)
    queue = RolloutQueue(crew, partial(_issue_step, session), recipe.sampler, config.max_staleness, recipe.run.steps)
    session.record_start()
    for step in session.remaining_steps():
        record = session.open_step(step)
        with session.span("generate"):
            issued, rollouts = queue.batch(step)
            if config.max_staleness:
                record.add(staleness_metrics(rollouts, crew.version))
        with session.span("reward"):
            rollouts, texts = grade(crew, issued, rollouts, tokenizer, recipe.reward_pool.batch_size)
            rollouts = grade_states(crew, issued, rollouts, tokenizer, recipe)
        record.add(session.grades.statuses(rollouts))
        trained = shuffle_grades(rollouts, session.noise, step) if recipe.task.shuffle_rewards else rollouts
        batch = crew.runtime.put(algorithm.credited(_batch_of(session, trained)))
        views: Future[list[Views]] | None = None
        reference: Sequence[Future[Reference]] = ()
        if session.needs_reference:
            with session.span("score"):
                views = crew.learners.make_views(batch)
                scorers = crew.scorers
                reference = scorers.score(views) if config.shared_noise else scorers.estimate(config, recipe.run.seed, batch)
        with session.span("replay"):
            replayed = session.check_replay(step, rollouts)
        with session.span("learn"):
            metrics = crew.learners.step(batch, views, reference)
        check_gradient(metrics)  # weights that are lost go nowhere
        session.tell_silence(metrics)
        if not recipe.weights.in_flight:
            with session.span("generate"):
                crew.generators.settle()
        with session.span("sync"):
            record.add(session.publish(step))
            if session.renews_reference(step):
                crew.copy_reference()
        record.add({**metrics, **replayed, **rollout_metrics(rollouts, session.stop_ids)})
        record.add(session.costs(len(rollouts)))
        session.keep_rollouts(step, issued, rollouts, texts)
        if session.evaluates(step):
            record.add(session.evaluate())
        session.log(record)
        if session.saves(step):
            session.save(step)
        if session.stop.requested:
            raise KeyboardInterrupt


def _batch_of(session: Session, rollouts: Sequence[Rollout]) -> Batch:
    """Graded rollouts as the batch that the recipe's algorithm trains on."""
    algorithm = session.recipe.algorithm
    return make_batch(
        rollouts,
        scored_length=algorithm.length,
        block_length=session.recipe.sampler.block_length,
        on_invalid=algorithm.on_invalid,
    )


def _issue_step(session: Session, step: int) -> Issued:
    """The requests of an online step; no two steps share a prompt row or a uid."""
    algorithm = session.recipe.algorithm
    prompts, completions = algorithm.prompts_per_step, algorithm.completions_per_prompt
    return issue(session.train_task, session.tokenizer, Phase.ONLINE, step, (step - 1) * prompts, prompts, completions)
