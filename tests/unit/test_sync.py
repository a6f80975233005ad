"""Weights in flight without Ray: buckets, what a receipt proves, and a crew that compares receipts whenever weights arrive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, SyncConfig
from rlhub.errors import SyncError, WorkerLost
from rlhub.models.llada import Config, LLaDA
from rlhub.types import Receipt
from workers.crew import Crew, GeneratorPool, GraderPool, LearnerGroup, ScorerGroup
from workers.generator import Generator
from workers.learner import Learner
from workers.runtimes.runtime import LocalRuntime, Resources
from workers.scorer import Scorer
from workers.sync import CANARY_TOKENS, bucket_plan, buckets_of, load_buckets, receipt_of
from workers.transports.object_store import Transport

MEGABYTES = 2 / 1024
BUCKET = int(MEGABYTES * 2**20)  # bytes, so small that there are several


def network(seed: int) -> LLaDA:
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24, "max_sequence_length": 32, "init_std": 0.3}
    return LLaDA(Config(**shape, vocab_size=12, mask_token_id=0, eos_token_id=1)).initialize(torch.Generator().manual_seed(seed)).eval()


def sent(model: torch.nn.Module) -> list[np.ndarray]:
    return list(buckets_of(model.state_dict(), BUCKET))


# ------------------------------------------------------------------------------------------------------------------ buckets


def test_buckets_hold_whole_tensors_in_their_order() -> None:
    state = {
        "a": torch.arange(3.0),
        "b": torch.arange(5.0),
        "c": torch.arange(9, dtype=torch.int16),
        "d": torch.ones(1),
        "e": torch.ones(2),
    }
    assert bucket_plan(state, 32) == [["a", "b"], ["c", "d", "e"]], "12 + 20 bytes, then 18 + 4 + 8"
    assert bucket_plan(state, 31) == [["a"], ["b"], ["c", "d", "e"]] and bucket_plan(state, 29) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert bucket_plan(state, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]], "larger than a bucket: alone"
    assert bucket_plan({}, 32) == []
    whole = b"".join(tensor.numpy().tobytes() for tensor in state.values())
    for size in (1, 29, 32, 1000):
        assert b"".join(bucket.tobytes() for bucket in buckets_of(state, size)) == whole


@pytest.mark.parametrize("writeable", [True, False])
def test_what_was_sent_is_what_is_held(writeable: bool) -> None:
    one, other = network(1), network(2)
    buckets = [bucket.copy() for bucket in sent(one)]
    for bucket in buckets:
        bucket.flags.writeable = writeable
    pointers = [parameter.data_ptr() for parameter in other.parameters()]
    load_buckets(other.state_dict(), buckets, BUCKET)
    assert len(buckets) > 3 and all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in other.parameters()], "in place"


def test_weights_of_another_shape_are_refused() -> None:
    state, buckets = network(1).state_dict(), sent(network(2))
    with pytest.raises(SyncError, match=rf"received {len(buckets) - 1} buckets, expected {len(buckets)}.*bucket_megabytes"):
        load_buckets(state, buckets[:-1], BUCKET)
    with pytest.raises(SyncError, match=rf"a bucket has {len(buckets[1]) - 4} bytes, expected {len(buckets[1])}"):
        load_buckets(state, [buckets[0], buckets[1][:-4], *buckets[2:]], BUCKET)


# ----------------------------------------------------------------------------------------------------------------- receipts

RECEIPT = Receipt(version=7, num_tensors=3, num_bytes=40, bucket_hashes=("aa", "bb", "cc"), canary=(1.0, 2.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 6},
        {"num_tensors": 2},
        {"num_bytes": 44},
        {"bucket_hashes": ("ab", "bb", "cc")},
        {"bucket_hashes": ("aa", "bb", "cd")},
        {"bucket_hashes": ("aa", "bb")},
        {"canary": (1.0, 2.5)},
    ],
    ids=str,
)
def test_receipts_that_differ_in_anything_do_not_agree(fields: dict) -> None:
    ((name, value),) = fields.items()
    other = replace(RECEIPT, **fields)
    assert RECEIPT.mismatch(RECEIPT) is None and RECEIPT.mismatch(replace(RECEIPT)) is None
    assert RECEIPT.mismatch(other) == f"{name}: published {getattr(RECEIPT, name)!r}, received {value!r}"


def test_a_receipt_says_what_is_held() -> None:
    model = network(1)
    receipt = receipt_of(model, 5, BUCKET)
    state = model.state_dict()
    assert receipt.version == 5 and receipt.num_tensors == len(state) and receipt == receipt_of(network(1), 5, BUCKET)
    assert receipt.num_bytes == sum(tensor.numel() * 4 for tensor in state.values())
    assert len(receipt.bucket_hashes) == len(set(receipt.bucket_hashes)) == len(sent(model)) > 3
    assert len(receipt.canary) == CANARY_TOKENS == 8


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_one_bit_of_any_bucket_shows(place: int) -> None:
    model = network(1)
    before = receipt_of(model, 5, BUCKET)
    name = bucket_plan(model.state_dict(), BUCKET)[place][-1]
    with torch.no_grad():
        model.state_dict()[name].view(-1).view(torch.int32)[-1] ^= 1
    after = receipt_of(model, 5, BUCKET)
    changed = [one != other for one, other in zip(before.bucket_hashes, after.bucket_hashes, strict=True)]
    assert changed == [index == place % len(changed) for index in range(len(changed))]
    assert before.mismatch(after).startswith("bucket_hashes: ")


def test_equal_weights_that_compute_otherwise_show_in_the_canary() -> None:
    class Broken(LLaDA):
        """As with a kernel that is wrong on one side."""

        def head(self, hidden: Tensor, target_rows: Tensor | None = None) -> Tensor:
            logits = super().head(hidden, target_rows).clone()
            logits[-1] += 0.5
            return logits

    model = network(1)
    broken = Broken(model.config)
    broken.load_state_dict(model.state_dict())
    difference = receipt_of(model, 5, BUCKET).mismatch(receipt_of(broken.eval(), 5, BUCKET))
    assert difference is not None and difference.startswith("canary: ")


def test_weights_that_are_not_finite_agree_with_themselves() -> None:
    model = network(1)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert receipt_of(model, 5, BUCKET).mismatch(receipt_of(model, 5, BUCKET)) is None


# ------------------------------------------------------------------------------------------------------------------ the crew


class Faulty(Generator):
    """Receives, and says what its fault makes of it."""

    def __init__(self, fault: dict, lost: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.fault, self.lost = fault, lost

    def receive(self, version: int, bucket_bytes: int, *buckets: np.ndarray) -> Receipt:
        if self.lost:
            raise WorkerLost("generator-0 died")
        received = super().receive(version, bucket_bytes, *buckets)
        return replace(received, **{name: change(getattr(received, name)) for name, change in self.fault.items()})


FAULTS = {
    "an old version": {"version": lambda version: version - 1},
    "a tensor less": {"num_tensors": lambda count: count - 1},
    "bytes left out": {"num_bytes": lambda count: count - 4},
    "another last bucket": {"bucket_hashes": lambda hashes: (*hashes[:-1], "other")},
    "another computation": {"canary": lambda values: (*values[:-1], values[-1] + 1e-6)},
}


def crew_of(folder: Path, fault: dict | None = None, lost: bool = False, num_generators: int = 1) -> Crew:
    """A learner of other weights than its generators and its scorer have."""
    runtime = LocalRuntime()
    for seed, name in enumerate(("learned", "first")):
        save_network(network(seed), folder / name)
    learner = runtime.spawn(
        "learner-0", Learner, Resources(), model_path=str(folder / "learned"), config=LearnerConfig(backend="torch"), run_seed=0
    )
    learner.worker.begin(AlgorithmConfig(), OptimizerConfig(), 1)
    generators = [
        runtime.spawn(f"generator-{index}", Faulty, Resources(), model_path=str(folder / "first"), run_seed=0, fault=fault or {}, lost=lost)
        for index in range(num_generators)
    ]
    scorer = runtime.spawn("scorer-0", Scorer, Resources(), model_path=str(folder / "first"), micro_batch_tokens=64)
    return Crew(
        runtime=runtime,
        learners=LearnerGroup(runtime, [learner]),
        scorers=ScorerGroup(runtime, [scorer]),
        generators=GeneratorPool(runtime, generators),
        graders=GraderPool(runtime, []),
        transport=Transport(runtime, [learner], SyncConfig(bucket_megabytes=MEGABYTES)),
        bucket_bytes=BUCKET,
    )


def held(handle) -> dict[str, Tensor]:
    return handle.worker.network.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_publishing_gives_every_generator_the_learners_weights(tmp_path: Path) -> None:
    crew = crew_of(tmp_path, num_generators=2)
    assert not any(same(held(handle), held(crew.learners.handles[0])) for handle in crew.generators.handles)
    receipt = crew.publish(9)
    assert receipt == receipt_of(network(0), 9, BUCKET) == crew.last_receipt and crew.version == 9
    for handle in crew.generators.handles:
        assert same(held(handle), held(crew.learners.handles[0])) and handle.worker.version == 9
    assert not same(held(crew.scorers.handles[0]), held(crew.learners.handles[0])), "the reference stays"
    crew.copy_reference()
    assert same(held(crew.scorers.handles[0]), held(crew.learners.handles[0]))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_generator_that_holds_something_else_stops_the_run(tmp_path: Path, fault: str) -> None:
    with pytest.raises(SyncError, match=rf"generator-0 holds other weights than the learners: {next(iter(FAULTS[fault]))}: published"):
        crew_of(tmp_path, FAULTS[fault]).publish(9)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_generator_that_comes_back_is_held_to_the_same(tmp_path: Path, fault: str) -> None:
    crew = crew_of(tmp_path)
    crew.publish(9)
    (generator,) = crew.generators.handles
    generator.worker.version, generator.worker.fault = -1, FAULTS[fault]
    with pytest.raises(SyncError, match="generator-0 holds other weights than the learners"):
        crew.generators.refresh(generator)
    generator.worker.fault = {}
    crew.generators.refresh(generator)
    assert generator.worker.version == 9


def test_a_generator_that_dies_on_the_way_is_left_out(tmp_path: Path) -> None:
    assert crew_of(tmp_path, lost=True).publish(9).version == 9
