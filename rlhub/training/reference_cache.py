"""Estimates of a frozen reference on disk: computed once, reused over epochs and runs.

    <folder>/<key>/key.json                       what the key is the hash of
    <folder>/<key>/plan_3/shard_00012.bin         values and draws of the pairs of 8 consecutive steps under one noise plan

The pairs of a plan lie in the order in which the epoch of that number goes through them, and are scored in the batches of its steps: so
a run that stops within an epoch computes little more than it uses, and what is read equals, bit for bit, what one scorer would say of the
batch. A shard carries a checksum and appears under its name only when it is whole, so a computation that was killed goes on where it
stood, and a damaged shard is noticed and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.pairs import PairOrder, Pairs
from rlhub.checkpoints.folders import base_folder, is_adapter_folder
from rlhub.errors import CheckpointError
from rlhub.files import replace_file
from rlhub.types import Batch, LogLikelihood

FORMAT = 1  # of shards, and of what makes a key; counts up with any change that changes estimates
SHARD_STEPS = 8
DIGEST_BYTES = 16

F = TypeVar("F")  # the future of an estimate


def cache_key(
    algorithm: Algorithm, pairs: Pairs, pairs_per_step: int, run_seed: int, reference: str, dtype: str
) -> tuple[str, dict[str, Any]]:
    """The name under which estimates are kept, and everything that it depends on.

    Args:
        reference: hash of the reference's weights, see `weights_hash`.
    """
    views, likelihood = ((module.__name__, asdict(config)) for module, config in (algorithm.views, algorithm.likelihood))
    facts = {
        "format": FORMAT,
        "data": pairs.fingerprint,
        "views": views,
        "likelihood": likelihood,
        "advantage": (algorithm.advantage[0].__name__, asdict(algorithm.advantage[1])),  # some likelihoods depend on its sign
        "noise": algorithm.reference_noise,
        "seed": run_seed,
        "reference": reference,
        "dtype": dtype,
        "pairs_per_step": pairs_per_step,
        "shard_steps": SHARD_STEPS,
    }
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest(), facts


def weights_hash(model_path: Path) -> str:
    """blake2b in hex over the weights and config.json of a model folder; of an adapter's folder, over its base too."""
    digest = hashlib.blake2b(digest_size=16)
    config = model_path / "config.json"
    if is_adapter_folder(model_path):
        config = model_path / "adapter_config.json"
        digest.update(weights_hash(base_folder(model_path)).encode())
    for file in sorted([*model_path.glob("*.safetensors"), config]):
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


@dataclass
class ReferenceCache:
    """Estimates of the reference for the pairs of a run.

    Args:
        folder: of this key.
        facts: what the key stands for.
    """

    folder: Path
    facts: dict[str, Any]
    pairs: Pairs
    order: PairOrder
    computed: set[tuple[int, int]] = field(default_factory=set)  # (plan, shard) that this process has made
    num_damaged: int = 0
    _plan: int = -1  # whose values are in memory
    _values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))  # [pairs in the order of the plan, G, 1 + K]
    _place: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # of each pair in `_values`
    _new: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # bool, whether this process made them

    def missing(self, total_steps: int) -> list[tuple[int, int]]:
        """The (plan, shard) that a run of so many steps needs and that are not there whole; damaged ones are counted and removed."""
        wanted = [(plan, shard) for plan, steps in self.order.needed(total_steps).items() for shard in range(-(-steps // SHARD_STEPS))]
        return [one for one in wanted if self._read(*one) is None]

    def fill(
        self, missing: Sequence[tuple[int, int]], num_workers: int, submit: Callable[[int, Batch], F], get: Callable[[F], LogLikelihood]
    ) -> Iterator[int]:
        """Compute shards on all workers, one ahead so that none waits; yields the number done after each.

        Args:
            submit: asks worker i for the estimate of a batch.
            get: its answer.
        """
        replace_file(self.folder / "key.json", json.dumps(self.facts, indent=2) + "\n")
        running: deque[tuple[int, int, list[F]]] = deque()

        def finish() -> None:
            plan, shard, futures = running.popleft()
            self._write(plan, shard, concatenated([get(future) for future in futures]))

        for number, (plan, shard) in enumerate(missing):
            if len(running) == 2:
                finish()
                yield number - len(running)
            steps = self.order.epoch(plan)[shard * SHARD_STEPS : (shard + 1) * SHARD_STEPS]
            futures = [submit(index % num_workers, self.pairs.batch(which, plan)) for index, which in enumerate(steps)]
            running.append((plan, shard, futures))
        while running:
            finish()
            yield len(missing) - len(running)

    def look_up(self, plan: int, indices: np.ndarray, batch: Batch) -> tuple[LogLikelihood, int]:
        """The estimate of `batch`, the pairs of these indices, and how many of its sequences were on disk before this process began.

        Raises:
            CheckpointError: a shard is gone or damaged since `missing` looked.
        """
        if plan != self._plan:
            self._load(plan)
        places = self._place[np.sort(indices)]
        if places.max() >= len(self._values):
            raise CheckpointError(f"{self.folder} lost a shard while it was used; the same command makes it again and continues")
        values = torch.from_numpy(self._values[places].reshape(len(indices) * self.pairs.group_size, -1).copy())
        hits = int((~self._new[places]).sum()) * self.pairs.group_size
        draws = values[:, 1:] if values.shape[1] > 1 else None
        return LogLikelihood(values[:, 0], "proxy", "sequence", torch.from_numpy(batch.scored_length), draws=draws), hits

    def _load(self, plan: int) -> None:
        shards: list[np.ndarray] = []
        while (values := self._read(plan, len(shards))) is not None:
            shards.append(values)
        self._plan, self._values = plan, np.concatenate(shards) if shards else self._values[:0]
        self._new = np.repeat([(plan, shard) in self.computed for shard in range(len(shards))], [len(values) for values in shards])
        self._place = np.argsort(np.concatenate(self.order.epoch(plan)), kind="stable")

    def _file(self, plan: int, shard: int) -> Path:
        return self.folder / f"plan_{plan}" / f"shard_{shard:05d}.bin"

    def _write(self, plan: int, shard: int, estimate: LogLikelihood) -> None:
        """Keep a shard: checksum, number of columns, then float64 [samples, 1 + K]."""
        columns = estimate.value[:, None] if estimate.draws is None else torch.cat([estimate.value[:, None], estimate.draws], 1)
        values = columns.double().numpy()
        content = values.shape[1].to_bytes(4, "little") + values.tobytes()
        file = self._file(plan, shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() + content)
        self.computed.add((plan, shard))

    def _read(self, plan: int, shard: int) -> np.ndarray | None:
        """Values [pairs, G, 1 + K] of a shard; None when it is not there or damaged, and then it is removed."""
        file = self._file(plan, shard)
        if not file.exists():
            return None
        blob = file.read_bytes()
        digest, content = blob[:DIGEST_BYTES], blob[DIGEST_BYTES:]
        if hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() != digest:
            self.num_damaged += 1
            file.unlink()
            return None
        columns = int.from_bytes(content[:4], "little")
        return np.frombuffer(content[4:], dtype=np.float64).reshape(-1, self.pairs.group_size, columns)


def concatenated(parts: Sequence[LogLikelihood]) -> LogLikelihood:
    """One estimate of the samples of several."""
    draws = [part.draws for part in parts if part.draws is not None]
    return replace(
        parts[0],
        value=torch.cat([part.value for part in parts]),
        scored_length=torch.cat([part.scored_length for part in parts]),
        draws=torch.cat(draws) if draws else None,
    )
