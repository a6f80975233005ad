"""Weights that change between two steps of a batch: rows go on from their canvases, each token knows its version, nothing else is kept.

The reference is the oracle, which computes every step from the canvas alone: with the old weights for some steps, then with the new ones.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from announcing import PATIENCE, Announcing

from rlhub import oracle
from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import SamplerConfig
from rlhub.engines.forward import Forward
from rlhub.engines.torch_engine import Engine
from rlhub.errors import SyncError
from rlhub.models import llada, sdar
from rlhub.noise import Noise
from rlhub.types import NEVER, Request, Rollout
from workers.generator import Generator, StaleWeights
from workers.step_gate import StepGate
from workers.sync import buckets_of, receipt_of

NOISE = Noise(run_seed=4)
VOCAB, MASK, EOS = 16, 0, 1
BUCKET = 1 << 12  # bytes, so small that there are several
NEAR_TIE = 1e-5  # nats; below it two exact fp32 implementations may decide differently


def network(family, seed: int) -> torch.nn.Module:
    """Weights so large that most laws are far from flat and depend on everything that is seen."""
    names = {"mask_token_id": MASK, "eos_token_id": EOS, "vocab_size": VOCAB}
    model = family.build(family.Config.from_published(family.TINY | names)).initialize(torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def requests(lengths=(3, 7, 5, 3, 9, 4)) -> list[Request]:
    random = np.random.default_rng(0)
    prompts = [random.integers(2, VOCAB, length).astype(np.int32) for length in lengths]
    prompts[3] = prompts[0]
    return [Request(uid=31 * index + 5, group_uid=index, prompt_ids=prompt) for index, prompt in enumerate(prompts)]


def sampler(name="low_confidence", **fields) -> SamplerConfig:
    return SamplerConfig(**({"name": name, "length": 12, "steps": 6, "block_length": 4, "temperature": 0.7, "early_stop": "off"} | fields))


def pushed(old: torch.nn.Module, new: torch.nn.Module, settings: SamplerConfig, after: int, max_rows: int = 512) -> list[Rollout]:
    """Rollouts of the engine whose model gets other weights after some steps."""
    model = copy.deepcopy(old)
    engine, steps = Engine(model, max_rows=max_rows), []

    def on_step() -> None:
        steps.append(1)
        if len(steps) == after:
            model.load_state_dict(new.state_dict())
            engine.weights_changed(1)

    return engine.generate(requests(), settings, NOISE, 0, on_step)


def reference(
    old: torch.nn.Module, new: torch.nn.Module, settings: SamplerConfig, after: int, patch: pytest.MonkeyPatch
) -> list[tuple[Rollout, float]]:
    """The same by the oracle, with its margins; `policy_version` is set for tokens that are not edited."""
    row_logits = oracle.state.row_logits
    found = []
    for request in requests():
        forwards: list[int] = []

        def switching(network: torch.nn.Module, tokens, forwards: list[int] = forwards) -> torch.Tensor:
            step = len(forwards) // (2 if settings.guidance else 1)
            forwards.append(step)
            return row_logits(old if step < after else new, tokens)

        with patch.context() as inner:
            inner.setattr(oracle.state, "row_logits", switching)
            rollout, margin = oracle.generate(old, request, settings, NOISE)
        steps = np.unique(rollout.unmask_step[rollout.unmask_step != NEVER])  # each commits something under these samplers
        last = steps[:after].max()
        rollout.policy_version[:] = np.where(rollout.unmask_step == NEVER, forwards[-1] >= after, rollout.unmask_step > last)
        found.append((rollout, margin))
    return found


def assert_same(found: list[Rollout], expected: list[tuple[Rollout, float]]) -> None:
    close = 0
    for ours, (theirs, margin) in zip(found, expected, strict=True):
        if margin < NEAR_TIE:
            close += 1
            continue
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.unmask_step, theirs.unmask_step)
        np.testing.assert_array_equal(ours.policy_version, theirs.policy_version)
        np.testing.assert_allclose(ours.logp_model, theirs.logp_model, atol=1e-4)
        assert ours.policy_version.dtype == np.int32
    assert close <= 1


def is_in_order(rollout: Rollout) -> bool:
    """Are the versions non-decreasing in the steps that committed the tokens?"""
    filled = rollout.unmask_step != NEVER
    return bool((np.diff(rollout.policy_version[filled][np.argsort(rollout.unmask_step[filled], kind="stable")]) >= 0).all())


# ------------------------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("family", [llada, sdar], ids=["full", "block_causal"])
def test_rows_go_on_from_their_canvases(family, after, temperature, monkeypatch):
    old, new, settings = network(family, 1), network(family, 2), sampler(temperature=temperature)
    found = pushed(old, new, settings, after)
    assert_same(found, reference(old, new, settings, after, monkeypatch))
    assert all(is_in_order(rollout) for rollout in found)
    assert all(set(rollout.policy_version) == {0, 1} for rollout in found)


@pytest.mark.parametrize(
    "settings",
    [sampler(length=20, steps=10, early_stop="fill_eos", temperature=4.0), sampler(guidance=0.5)],
    ids=["early_stop", "guidance"],
)
@pytest.mark.parametrize("family", [llada, sdar], ids=["full", "block_causal"])
def test_rows_that_end_early_and_rows_with_a_double(family, settings, monkeypatch):
    """What an early stop fills has the version that ended the row."""
    old, new = network(family, 1), network(family, 2)
    found = pushed(old, new, settings, 3)
    assert_same(found, reference(old, new, settings, 3, monkeypatch))
    if settings.early_stop == "fill_eos":
        filled = [rollout.policy_version[rollout.unmask_step == NEVER] for rollout in found]
        assert {int(version) for versions in filled for version in versions} == {0, 1}


def test_an_edited_token_has_the_version_that_wrote_it(monkeypatch):
    """One block, whose steps are numbered as they run; an edit is later than what first filled the position."""
    options = {"threshold": 0.5, "editing_threshold": 0.2, "max_post_steps": 3}
    settings, after = sampler("edit", length=12, block_length=12, steps=6, options=options), 3
    old, new = network(llada, 1), network(llada, 2)
    found = pushed(old, new, settings, after)
    rewritten = 0
    for ours, (theirs, margin) in zip(found, reference(old, new, settings, after, monkeypatch), strict=True):
        if margin < NEAR_TIE:
            continue
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        written = theirs.unmask_step.copy()
        for step, position, *_ in theirs.edits:
            written[position] = step
        np.testing.assert_array_equal(ours.policy_version, written >= after)
        rewritten += int(((written >= after) & (theirs.unmask_step < after)).sum())
    assert rewritten > 3


@pytest.mark.parametrize("family", [llada, sdar], ids=["full", "block_causal"])
def test_requests_that_wait_find_the_new_weights(family):
    """Two rows at once, so the last requests begin after the push, one of them with a prompt that was shared before it."""
    old, new = network(family, 1), network(family, 2)
    found = pushed(old, new, sampler(), 4, max_rows=2)
    assert [rollout.uid for rollout in found] == [request.uid for request in requests()]
    after = Engine(new).generate(requests(), sampler(), NOISE, 1)
    for ours, theirs in zip(found[2:], after[2:], strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        assert (ours.policy_version == 1).all()
    assert all(set(rollout.policy_version) == {0, 1} for rollout in found[:2])


def test_keys_of_the_old_weights_would_give_other_rollouts(monkeypatch):
    """So the comparisons above notice a cache that is not computed again."""
    old, new, settings = network(sdar, 1), network(sdar, 2), sampler(temperature=0.0)
    found = pushed(old, new, settings, 3)
    monkeypatch.setattr(Forward, "forget", lambda self: None)
    stale = pushed(old, new, settings, 3)
    assert sum(not np.array_equal(*(rollout.completion_ids for rollout in pair)) for pair in zip(found, stale, strict=True)) >= 3


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_an_approximate_cache_is_refreshed(cache):
    """The push falls into the first block, after its refresh; from there on rows are those of a cache that is refreshed at every step."""
    old, new = network(llada, 1), network(llada, 2)
    settings = sampler(cache=cache, temperature=0.0, length=8, block_length=8, steps=2)
    every = sampler(cache=cache, temperature=0.0, length=8, block_length=8, steps=2, cache_refresh=1)
    for ours, theirs in zip(pushed(old, new, settings, 1), pushed(old, new, every, 1), strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.logp_model, theirs.logp_model)


# -------------------------------------------------------------------------------------------------------------------- the gate


@contextmanager
def pausing(gate: StepGate, events: list, name: object) -> Iterator[None]:
    with gate.paused():
        events.append(("begin", name))
        yield
        events.append(("end", name))


def test_a_pause_has_its_turn_at_the_next_boundary():
    """Also two that were asked for before the same step: one after the other, and no step before both are over."""
    events: list = []

    def pause(name: str) -> None:
        with pausing(gate, events, name):
            pass

    gate = Announcing({2: lambda: pause("a"), 5: lambda: pause("b"), 6: lambda: pause("c")})
    with gate.loop():
        for number in range(1, 8):
            events.append(number)
            if number == 5:  # the second of two pauses
                gate.threads.submit(pause, "d")
                assert gate.asked.acquire(timeout=PATIENCE)
            gate.step()
    places = {event: place for place, event in enumerate(events)}
    assert places[2] < places["begin", "a"] < places["end", "a"] < places[3]
    assert {events[place] for place in range(places[5] + 1, places[6])} == {(edge, name) for edge in ("begin", "end") for name in "bd"}
    assert [kind for kind, _ in events[places[5] + 1 : places[6]]] == ["begin", "end"] * 2
    assert places[6] < places["begin", "c"] < places[7]


def test_a_pause_where_nothing_runs_has_its_turn_at_once():
    gate, events = StepGate(), []
    with pausing(gate, events, 0):
        events.append("held")
    with gate.loop():
        gate.step()
    assert events == [("begin", 0), "held", ("end", 0)]


def test_a_loop_does_not_begin_in_a_pause():
    gate, events, paused, go_on = StepGate(), [], threading.Event(), threading.Event()

    def pause() -> None:
        with pausing(gate, events, 0):
            paused.set()
            assert go_on.wait(PATIENCE)

    def loop() -> None:
        with gate.loop():
            events.append("loop")

    with ThreadPoolExecutor(2) as threads:
        pause_done = threads.submit(pause)
        assert paused.wait(PATIENCE)
        loop_done = threads.submit(loop)
        go_on.set()
        pause_done.result(PATIENCE), loop_done.result(PATIENCE)
    assert events == [("begin", 0), ("end", 0), "loop"]


def test_failures_on_either_side_let_the_other_go_on():
    def failing() -> None:
        with gate.paused():
            raise ZeroDivisionError

    gate = Announcing({1: failing})
    with pytest.raises(KeyError), gate.loop():
        gate.step()
        with pytest.raises(ZeroDivisionError):
            gate.futures[0].result(PATIENCE)
        gate.threads.submit(failing)
        assert gate.asked.acquire(timeout=PATIENCE)
        raise KeyError  # while somebody waits
    with pytest.raises(ZeroDivisionError):
        gate.threads.submit(failing).result(PATIENCE)
    with gate.loop():
        gate.step()


# --------------------------------------------------------------------------------------------------------------- the generator


@pytest.fixture(params=[llada, sdar], ids=["full", "block_causal"])
def pair(request) -> tuple[torch.nn.Module, torch.nn.Module]:
    return network(request.param, 1), network(request.param, 2)


def generator_of(model: torch.nn.Module, folder: Path) -> Generator:
    save_network(model, folder)
    generator = Generator(str(folder), NOISE.run_seed)
    generator.receive(0, BUCKET, *buckets_of(model.state_dict(), BUCKET))
    return generator


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_weights_arrive_in_the_middle_of_a_batch(pair, temperature, tmp_path):
    """From another thread, twice; the rollouts are the engine's, and the receipts the sender's."""
    old, new = pair
    settings, generator = sampler(temperature=temperature), generator_of(old, tmp_path)
    buckets = list(buckets_of(new.state_dict(), BUCKET))
    generator.gate = Announcing({3: lambda: generator.receive(1, BUCKET, *buckets)})
    found = generator.generate(requests(), settings, 0)
    assert generator.gate.futures[0].result(PATIENCE) == receipt_of(new, 1, BUCKET)
    before = Engine(old).generate(requests(), settings, NOISE, 0)
    for ours, theirs, first in zip(found, pushed(old, new, settings, 3), before, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.policy_version, theirs.policy_version)
        assert is_in_order(ours) and set(ours.policy_version) == {0, 1}
        untouched = ours.policy_version == 0
        np.testing.assert_array_equal(ours.completion_ids[untouched], first.completion_ids[untouched])
        np.testing.assert_array_equal(ours.logp_model[untouched], first.logp_model[untouched])
    assert [rollout.policy_version.min() for rollout in generator.generate(requests(), settings, 0)] == [1] * 6, "version: at least"
    with pytest.raises(StaleWeights, match="holds version 1, asked for 2"):
        generator.generate(requests(), settings, 2)


def test_two_updates_of_one_batch(tmp_path):
    old, new = network(llada, 1), network(llada, 2)
    generator = generator_of(old, tmp_path)
    updates = {version: list(buckets_of(model.state_dict(), BUCKET)) for version, model in ((1, new), (2, old))}
    generator.gate = Announcing(
        {2: lambda: generator.receive(1, BUCKET, *updates[1]), 4: lambda: generator.receive(2, BUCKET, *updates[2])}
    )
    for rollout in generator.generate(requests(), sampler(), 0):
        assert is_in_order(rollout) and set(rollout.policy_version) == {0, 1, 2}


def test_half_of_new_weights_generates_nothing(pair, tmp_path):
    """Neither the batch at work nor later ones, until all of them arrive."""
    old, new = pair
    generator = generator_of(old, tmp_path)
    buckets = list(buckets_of(new.state_dict(), BUCKET))
    generator.gate = Announcing({3: lambda: generator.receive(1, BUCKET, *buckets[:-1], buckets[-1][:-4])})
    with pytest.raises(StaleWeights, match="a part of new weights"):
        generator.generate(requests(), sampler(), 0)
    with pytest.raises(SyncError):
        generator.gate.futures[0].result(PATIENCE)
    assert not torch.equal(next(generator.network.parameters()), next(old.parameters())), "a part has arrived"
    for version in (-1, 0, 1):
        with pytest.raises(StaleWeights, match="a part of new weights"):
            generator.generate(requests(), sampler(), version)
    assert generator.receive(1, BUCKET, *buckets) == receipt_of(new, 1, BUCKET)
    expected = Engine(new).generate(requests(), sampler(), NOISE, 1)
    for ours, theirs in zip(generator.generate(requests(), sampler(), 1), expected, strict=True):
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        np.testing.assert_array_equal(ours.policy_version, theirs.policy_version)
