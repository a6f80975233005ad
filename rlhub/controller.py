"""The loops, written once for laptop and cluster.

    prompts -> generators -> rollouts -> reward workers -> graded groups
                                                             |
                               learner makes views -> scorers: log-probs of the reference
                                                             v
        generators <- weights with receipts <-------------- learners

`run_online` waits for each of these in turn (`max_staleness: 0`): a step trains on rollouts of the weights it began with. `run_sft`
keeps one batch ahead of the learners. Every step is a pure function of the weights and its number, so a killed run continues from
its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

from rlhub.batching import make_batch
from rlhub.config import AlgorithmConfig
from rlhub.health import rollout_metrics
from rlhub.pipeline import ONLINE, demonstration_batch, generate, grade, issue, shuffle_grades
from rlhub.run_state import Session


def run_sft(session: Session) -> None:
    """Supervised training on demonstrations: the ELBO of each completion per token, through the same learner as everything else."""
    recipe, crew = session.recipe, session.crew
    config = recipe.sft
    algorithm = AlgorithmConfig(
        advantage={"name": "constant"},
        views={"name": "elbo", "draws": config.draws},
        likelihood={"name": "elbo"},
        objective={"name": "weighted_likelihood"},
        behavior="none",
    )
    session.begin("sft", algorithm, config.optimizer, config.steps)
    upcoming = None
    for step in session.steps("sft", config.steps, config.eval_every):
        batch = upcoming or demonstration_batch(session.train_task, session.tokenizer, recipe, step)
        futures = [crew.runtime.submit(learner, "step", batch) for learner in crew.learners]
        if step < config.steps:
            upcoming = demonstration_batch(session.train_task, session.tokenizer, recipe, step + 1)
        with session.span("learn"):
            metrics, *_ = crew.collect(futures)
        session.finish_step(metrics, num_samples=config.batch_size)


def run_online(session: Session) -> None:
    """Reinforcement learning on rollouts of the current policy."""
    recipe, crew = session.recipe, session.crew
    algorithm = recipe.algorithm
    session.begin("online", algorithm, recipe.learner.optimizer, recipe.run.steps * algorithm.updates)
    for step in session.steps("online", recipe.run.steps, recipe.run.eval_every):
        with session.span("generate"):
            first_row = (step - 1) * algorithm.prompts_per_step
            issued = issue(
                session.train_task, session.tokenizer, ONLINE, step, first_row, algorithm.prompts_per_step, algorithm.completions_per_prompt
            )
            rollouts = generate(crew, issued, recipe.sampler)
        with session.span("reward"):
            rollouts, texts = grade(crew, issued, rollouts, session.tokenizer, recipe.reward_pool.batch_size)
            trained = shuffle_grades(rollouts, session.noise, step) if recipe.task.shuffle_rewards else rollouts
        batch = crew.runtime.put(
            make_batch(
                trained,
                mask_id=session.tokenizer.mask_token_id,
                span=algorithm.length,
                block_length=recipe.sampler.block_length,
                on_invalid=algorithm.on_invalid,
            )
        )
        views, reference = None, []
        if session.needs_reference:
            with session.span("score"):
                views = crew.runtime.submit(crew.learners[0], "make_views", batch)
                count = len(crew.scorers)
                reference = [crew.runtime.submit(scorer, "score", views, index, count) for index, scorer in enumerate(crew.scorers)]
                crew.collect(reference)
        with session.span("learn"):
            metrics = crew.learn("step", batch, views, *reference)
        with session.span("sync"):
            session.publish(step)
        session.finish_step(metrics | rollout_metrics(rollouts, session.tokenizer.eos_token_id), num_samples=len(rollouts))
        session.keep_rollouts(step, issued, rollouts, texts)
