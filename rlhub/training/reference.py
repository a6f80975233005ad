"""The reference's estimates for steps on preference pairs: from the cache on disk, or scored live, through the noise that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from rlhub.algorithm.compose import CreditedBatch
from rlhub.algorithm.pairs import PairOrder, Pairs, cache_folder
from rlhub.training.reference_cache import ReferenceCache, cache_key, concatenated, weights_hash
from rlhub.training.session import Session
from rlhub.types import Batch, LogLikelihood
from workers.runtimes.runtime import Future


@dataclass
class PairReference:
    """Answers what the reference says of a batch.

    Args:
        session: the run, whose scorers hold the reference.
        cache: filled already; None scores every batch live.
    """

    session: Session
    pairs: Pairs
    order: PairOrder
    cache: ReferenceCache | None

    def estimates(self, which: np.ndarray, credited: CreditedBatch) -> tuple[list[dict[int, LogLikelihood]], dict[str, int]]:
        """What `Learner.step` takes as the reference for the pairs `which`, and where it came from in sequences."""
        batch = credited.batch
        if self.cache is None:
            return [self._live(which, batch.epoch)], {}
        estimate, hits = self.cache.look_up(batch.epoch, which, batch)
        counts = {"system/reference_cache_hits": hits, "system/reference_cache_computed": len(batch) - hits}
        return [{0: estimate}], counts

    def _live(self, which: np.ndarray, epoch: int) -> dict[int, LogLikelihood]:
        scorers = self.session.crew.scorers
        shares = [share for share in np.array_split(np.sort(which), len(scorers.handles)) if len(share)]
        parts = scorers.collect([begin_estimate(self.session, index, self.pairs.batch(share, epoch)) for index, share in enumerate(shares)])
        return {index: concatenated([part[index] for part in parts]) for index in parts[0]}


def begin_estimate(session: Session, worker: int, batch: Batch) -> Future[dict[int, LogLikelihood]]:
    """Ask one scorer for the reference's estimates of a batch."""
    recipe = session.recipe
    return session.crew.scorers.begin_estimate(worker, recipe.algorithm, recipe.run.seed, session.algorithm.credited(batch))


def open_reference(session: Session, pairs: Pairs, order: PairOrder) -> PairReference | None:
    """The reference of a run on pairs, with its cache filled; None when nothing compares with it.

    Raises:
        KeyboardInterrupt: the user stopped; the shards that were made stay.
    """
    if session.reference_path is None:
        return None
    recipe = session.recipe
    folder = cache_folder(recipe)
    if folder is None:
        return PairReference(session, pairs, order, None)
    key, facts = cache_key(
        session.algorithm, pairs, order.pairs_per_step, recipe.run.seed, weights_hash(session.reference_path), recipe.model.dtype
    )
    cache = ReferenceCache(folder / key, facts, pairs, order)
    missing = cache.missing(recipe.run.steps)
    if cache.num_damaged:
        session.progress.message(f"{cache.num_damaged} damaged shards of the reference cache {cache.folder} are made again")
    if missing:
        session.progress.phase("reference", len(missing))
        get = session.crew.runtime.get
        for done in cache.fill(missing, len(session.crew.scorers.handles), partial(begin_estimate, session), lambda future: get(future)[0]):
            session.progress.update(done)
            if session.stop.requested:
                raise KeyboardInterrupt
    return PairReference(session, pairs, order, cache)
