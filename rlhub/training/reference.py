"""The reference's estimates for steps on preference pairs: from the cache on disk, or scored live, through the noise that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.pairs import PairOrder, Pairs, cache_folder
from rlhub.training.reference_cache import ReferenceCache, cache_key, concatenated, weights_hash
from rlhub.types import Batch, LogLikelihood


@dataclass
class PairReference:
    """Answers what the reference says of a batch.

    Args:
        session: the run, whose scorers hold the reference.
        cache: filled already; None scores every batch live.
    """

    session: Any
    pairs: Pairs
    order: PairOrder
    cache: ReferenceCache | None

    def estimates(self, which: np.ndarray, batch: Batch) -> tuple[list[dict[int, LogLikelihood]], dict[str, float]]:
        """What `Learner.step` takes as the reference for the pairs `which`, and where it came from in sequences."""
        if self.cache is None:
            return [self._live(which, batch.epoch)], {}
        estimate, hits = self.cache.look_up(batch.epoch, which, batch)
        counts = {"system/reference_cache_hits": hits, "system/reference_cache_computed": len(batch) - hits}
        return [{0: estimate}], counts

    def _live(self, which: np.ndarray, epoch: int) -> dict[int, LogLikelihood]:
        crew = self.session.crew
        shares = [share for share in np.array_split(np.sort(which), len(crew.scorers)) if len(share)]
        parts = crew.collect([submit_estimate(self.session, index, self.pairs.batch(share, epoch)) for index, share in enumerate(shares)])
        return {index: concatenated([part[index] for part in parts]) for index in parts[0]}


def submit_estimate(session: Any, worker: int, batch: Batch) -> Any:
    """Ask one scorer for the reference's estimates of a batch; a future."""
    crew, recipe = session.crew, session.recipe
    return crew.runtime.submit(crew.scorers[worker], "estimate", recipe.algorithm, recipe.run.seed, batch)


def open_reference(session: Any, order: PairOrder) -> PairReference | None:
    """The reference of a run on pairs, with its cache filled; None when nothing compares with it.

    Raises:
        KeyboardInterrupt: the user stopped; the shards that were made stay.
    """
    if not session.needs_reference:
        return None
    recipe, pairs = session.recipe, session.pairs.train
    folder = cache_folder(recipe)
    if folder is None:
        return PairReference(session, pairs, order, None)
    algorithm = Algorithm.compose(recipe.algorithm)
    key, facts = cache_key(
        algorithm, pairs, order.pairs_per_step, recipe.run.seed, weights_hash(session.reference_path), recipe.model.dtype
    )
    cache = ReferenceCache(folder / key, facts, pairs, order)
    missing = cache.missing(recipe.run.steps)
    if cache.num_damaged:
        session.progress.message(f"{cache.num_damaged} damaged shards of the reference cache {cache.folder} are made again")
    if missing:
        session.progress.phase("reference", len(missing))
        get = session.crew.runtime.get
        for done in cache.fill(
            missing, len(session.crew.scorers), lambda worker, batch: submit_estimate(session, worker, batch), lambda future: get(future)[0]
        ):
            session.progress.update(done)
            if session.stop.requested:
                raise KeyboardInterrupt
    return PairReference(session, pairs, order, cache)
