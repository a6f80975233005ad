"""The engine on vLLM against the torch engine: the same keys give the same rollouts. Needs vLLM; see docs/vllm.md."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from announcing import PATIENCE, Announcing
from torch import Tensor

from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import SamplerConfig
from rlhub.engines import torch_engine, vllm_engine
from rlhub.errors import DataError, UserError
from rlhub.models import dream, llada, llada2, llada_moe, sdar
from rlhub.noise import Noise
from rlhub.types import NEVER, Layout, Request, Rollout
from workers.generator import Generator, StaleWeights
from workers.sync import buckets_of, receipt_of

pytestmark = pytest.mark.vllm

NOISE = Noise(run_seed=4)
VOCAB, MASK, EOS, BLOCK = 40, 0, 1, 4
LLAMA = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96}
FIELDS = {
    llada: {"d_model": 64, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 96, "max_sequence_length": 96},
    sdar: LLAMA | {"block_size": BLOCK, "max_position_embeddings": 96},
    dream: LLAMA | {"max_position_embeddings": 96},
    llada_moe: {"hidden_size": 64, "max_position_embeddings": 96},
    llada2: {"head_dim": 32, "block_length": BLOCK, "max_position_embeddings": 96},
}


def network(family=llada, seed: int = 1, spread: float = 0.12) -> torch.nn.Module:
    """Weights so large that attention matters and most laws are far from flat.

    Args:
        spread: standard deviation of the weights.
    """
    fields = family.TINY | FIELDS[family] | {"mask_token_id": MASK, "eos_token_id": EOS, "vocab_size": VOCAB}
    model = family.build(family.Config.from_published(fields)).initialize(torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread / model.shape.init_std)
    return model


class Masked:
    """A network of full attention that the torch engine runs over prompt and canvas, seen through another mask.

    Args:
        block_of: int64 [T], the attention block of each position of rows, from their positions and the length of the row's prompt.
    """

    def __init__(self, model: torch.nn.Module, canvas: int, block_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.canvas, self.block_of = model, canvas, block_of

    def __getattr__(self, name):
        return getattr(self.model, name)

    def denoise(self, tokens, layout: Layout, targets=None, cache=None):
        prompt = (layout.lengths - self.canvas).repeat_interleave(layout.lengths)
        blocks = self.block_of(layout.position_ids.long(), prompt).int()
        return self.model.denoise(tokens, dataclasses.replace(layout, attention="block_causal", block_ids=blocks), targets=targets)


def response_blocks(position: Tensor, prompt: Tensor) -> Tensor:
    return torch.where(position < prompt, 0, 1 + (position - prompt) // BLOCK)


def requests(lengths=(16, 5, 3, 12, 1, 9, 33, 8), uid: int = 0) -> list[Request]:
    random = np.random.default_rng(uid)
    prompts = [random.integers(2, VOCAB, length).astype(np.int32) for length in lengths]
    return [Request(uid=31 * index + 5 + uid, group_uid=index, prompt_ids=prompt) for index, prompt in enumerate(prompts)]


def sampler(name="low_confidence", temperature=0.7, **fields) -> SamplerConfig:
    fields = {"length": 16, "steps": 8, "block_length": BLOCK, "early_stop": "off"} | fields
    return SamplerConfig(name=name, temperature=temperature, **fields)


def differences(found: list[Rollout], expected: list[Rollout]) -> int:
    """Rollouts whose tokens differ. Where they are the same, so must be the records."""
    different = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.uid == theirs.uid
        if not np.array_equal(ours.completion_ids, theirs.completion_ids):
            different += 1
            continue
        np.testing.assert_array_equal(ours.unmask_step, theirs.unmask_step)
        np.testing.assert_array_equal(ours.policy_version, theirs.policy_version)
        assert (ours.length, ours.num_forwards) == (theirs.length, theirs.num_forwards)
        for name in ("logp_model", "logp_sample"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
    return different


KEPT = []  # the end of one of vLLM's engines takes the process's groups from the others


def engine(model: torch.nn.Module, max_rows: int = 4, **options) -> vllm_engine.Engine:
    KEPT.append(vllm_engine.Engine(model, max_rows=max_rows, **options))
    return KEPT[-1]


@pytest.fixture(scope="module")
def full() -> vllm_engine.Engine:
    return engine(network(llada))


@pytest.fixture(scope="module")
def block() -> vllm_engine.Engine:
    return engine(network(sdar))


@pytest.fixture(scope="module")
def response() -> vllm_engine.Engine:
    return engine(network(llada), layout="response", block_length=BLOCK)


RULES = [
    sampler("low_confidence"),
    sampler("low_confidence", temperature=0.0),
    sampler("threshold", options={"threshold": 0.6}, steps=16),
    sampler("threshold", temperature=0.0, options={"threshold": 0.6}, steps=16),
    sampler("left_to_right", steps=16),
    sampler("left_to_right", temperature=0.0, steps=16),
    sampler("low_confidence", early_stop="fill_eos", steps=16),
    sampler("entropy", eos="last", top_p=0.9, records=["entropy", "order"]),
]
IDS = [f"{rule.name}-{rule.temperature:g}-{rule.early_stop}-{rule.eos}" for rule in RULES]


@pytest.mark.parametrize("settings", RULES, ids=IDS)
def test_full_attention_is_the_torch_engines(full, settings):
    expected = torch_engine.Engine(full.model).generate(requests(), settings, NOISE, 3)
    assert differences(full.generate(requests(), settings, NOISE, 3), expected) == 0


@pytest.mark.parametrize("settings", RULES, ids=IDS)
def test_blocks_are_the_torch_engines(block, settings):
    """With prompts shorter than a block, and ones that end within a block."""
    expected = torch_engine.Engine(block.model).generate(requests(), settings, NOISE, 3)
    assert differences(block.generate(requests(), settings, NOISE, 3), expected) == 0


@pytest.mark.parametrize("settings", RULES, ids=IDS)
def test_blocks_of_the_response_are_the_torch_engines(response, settings):
    reference = torch_engine.Engine(Masked(response.model, settings.length, response_blocks))
    expected = reference.generate(requests(), settings, NOISE, 3)
    assert differences(response.generate(requests(), settings, NOISE, 3), expected) == 0


@pytest.mark.parametrize("wrong", [response_blocks, lambda position, prompt: torch.zeros_like(position)], ids=["response", "full"])
def test_another_mask_gives_other_rollouts(block, wrong):
    """So the comparisons above are sensitive to the mask; a prompt within the first block of 4 hardly differs."""
    settings, asked = sampler(), requests((6, 7, 11, 13, 14, 18))
    model = network(sdar)
    model.profile = dataclasses.replace(model.profile, attention="full", block_length=None)
    reference = torch_engine.Engine(Masked(model, settings.length, wrong))
    assert differences(block.generate(asked, settings, NOISE), reference.generate(asked, settings, NOISE)) >= 5


@pytest.mark.parametrize("family", [dream, llada_moe, llada2], ids=lambda family: family.__name__.rpartition(".")[2])
def test_other_families(family):
    """A logit shift under full attention, and mixtures of experts under both masks."""
    ours, settings = engine(network(family, spread=0.08), max_rows=3), sampler("entropy")
    expected = torch_engine.Engine(ours.model).generate(requests(), settings, NOISE)
    assert differences(ours.generate(requests(), settings, NOISE), expected) == 0


def test_preempted_requests_are_resumed_with_the_same_result():
    """Six pages of 32 tokens for rows of up to three; short prompts too, whose pages are shifted."""
    model, settings = network(sdar), sampler(length=48, steps=24)
    token_bytes = 2 * model.shape.num_layers * model.shape.num_kv_heads * model.shape.head_dim * 4
    ours = engine(model, kv_bytes=6 * 32 * token_bytes)
    for temperature in (0.0, 0.7):
        settings = dataclasses.replace(settings, temperature=temperature)
        preempted = ours.metric("vllm:num_preemptions")
        expected = torch_engine.Engine(model).generate(requests(), settings, NOISE)
        assert differences(ours.generate(requests(), settings, NOISE), expected) == 0
        assert ours.metric("vllm:num_preemptions") > preempted


def test_shared_prefixes_are_found_until_the_weights_change():
    ours, settings = engine(network(sdar)), sampler()
    prompt = requests((71,))[0].prompt_ids
    asked = [Request(uid=900 + member, group_uid=0, prompt_ids=prompt) for member in range(5)]

    def hits() -> int:
        before = ours.metric("vllm:prefix_cache_hits")
        expected = torch_engine.Engine(ours.model).generate(asked, settings, NOISE)
        assert differences(ours.generate(asked, settings, NOISE), expected) == 0
        return ours.metric("vllm:prefix_cache_hits") - before

    assert hits() == 4 * 64  # two pages of the first request
    assert hits() == 5 * 64
    ours.model.load_state_dict(network(sdar, seed=2).state_dict())
    ours.weights_changed(1)
    assert hits() == 4 * 64


def test_a_generator_adopts_pushed_weights(tmp_path):
    """Its receipt is the sender's, and its rollouts are those of the new weights."""
    old, new = network(sdar, seed=1), network(sdar, seed=2)
    save_network(old, tmp_path)
    generator = Generator(str(tmp_path), NOISE.run_seed, engine="vllm", max_rows=4)
    KEPT.append(generator)
    for version, model in enumerate((old, new, old)):
        receipt = generator.receive(version, 1 << 14, *buckets_of(model.state_dict(), 1 << 14))
        assert receipt_of(model, version, 1 << 14).mismatch(receipt) is None
        expected = torch_engine.Engine(model).generate(requests(), sampler(), NOISE, version)
        assert differences(generator.generate(requests(), sampler(), version), expected) == 0
    with pytest.raises(StaleWeights):
        generator.generate(requests(), sampler(), 7)


def continued(old: torch.nn.Module, new: torch.nn.Module, request: Request, settings: SamplerConfig, steps: int) -> Rollout:
    """A rollout of the torch engine whose model gets other weights after some of its steps, with versions 0 and 1."""
    model = copy.deepcopy(old if steps else new)
    ours, taken = torch_engine.Engine(model), []

    def on_step() -> None:
        taken.append(1)
        if len(taken) == steps:
            model.load_state_dict(new.state_dict())
            ours.weights_changed(1)

    return ours.generate([request], settings, NOISE, int(steps == 0), on_step)[0]


def differences_of_a_push(found: list[Rollout], old: torch.nn.Module, new: torch.nn.Module, settings: SamplerConfig) -> int:
    """Rollouts that differ from the torch engine's with the push after the same step of each: vLLM's rows are not all as far.

    Every step must commit something. Some rollouts must span the push.
    """
    asked = requests()
    steps = [len(np.unique(rollout.unmask_step[(rollout.policy_version == 0) & (rollout.unmask_step != NEVER)])) for rollout in found]
    assert sum(set(rollout.policy_version) == {0, 1} for rollout in found) >= 2
    expected = [continued(old, new, request, settings, count) for request, count in zip(asked, steps, strict=True)]
    return differences(found, expected)


def push_when(ours: vllm_engine.Engine, settings: SamplerConfig, new: torch.nn.Module, due: Callable[[int], bool]) -> list[Rollout]:
    """Rollouts of an engine that gets other weights at the first step that is `due`; it has its own again afterwards."""
    old, steps, pushed = {name: value.clone() for name, value in ours.model.state_dict().items()}, [], []

    def on_step() -> None:
        steps.append(1)
        if not pushed and due(len(steps)):
            pushed.append(1)
            ours.model.load_state_dict(new.state_dict())
            ours.weights_changed(1)

    try:
        return ours.generate(requests(), settings, NOISE, 0, on_step)
    finally:
        assert pushed
        ours.model.load_state_dict(old)
        ours.weights_changed(0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("after", [4, 5, 6, 17])
@pytest.mark.parametrize("layout", ["full", "block"])
def test_weights_that_change_between_steps(layout, after, temperature, full, block):
    """Eight requests, four of them at once, some of which wait, run their prompt, denoise or store a finished block at the push."""
    ours, family = {"full": (full, llada), "block": (block, sdar)}[layout]
    settings, new = sampler(temperature=temperature), network(family, seed=2)
    found = push_when(ours, settings, new, lambda step: step == after)
    assert differences_of_a_push(found, ours.model, new, settings) == 0


def test_old_pages_would_give_other_rollouts(block, monkeypatch):
    """So the comparison above notices keys and values that are not computed again."""
    settings, new = sampler(temperature=0.0), network(sdar, seed=2)
    reset = block.llm.reset_prefix_cache
    monkeypatch.setattr(block.llm, "reset_prefix_cache", lambda **_: None)
    found = push_when(block, settings, new, lambda step: step == 6)
    reset()
    assert differences_of_a_push(found, block.model, new, settings) >= 2


def test_weights_that_change_while_requests_are_preempted():
    """The push comes when pages have run out for the first time, and again the requests are served to their end, once each."""
    model, new, settings = network(sdar), network(sdar, seed=2), sampler(length=48, steps=24)
    token_bytes = 2 * model.shape.num_layers * model.shape.num_kv_heads * model.shape.head_dim * 4
    ours = engine(model, kv_bytes=6 * 32 * token_bytes)
    before = ours.metric("vllm:num_preemptions")
    found = push_when(ours, settings, new, lambda step: ours.metric("vllm:num_preemptions") > before)
    assert [rollout.uid for rollout in found] == [request.uid for request in requests()]
    steps = [len(np.unique(rollout.unmask_step[rollout.policy_version == 0])) for rollout in found]
    assert sum(0 < count < 24 for count in steps) >= 2
    expected = [continued(model, new, request, settings, count) for request, count in zip(requests(), steps, strict=True)]
    assert differences(found, expected) == 0


def test_a_generator_adopts_weights_in_the_middle_of_a_batch(tmp_path):
    """Pushed by another thread; half of new weights ends the batch and leaves the engine able to serve."""
    old, new, settings = network(sdar, seed=1), network(sdar, seed=2), sampler()
    save_network(old, tmp_path)
    generator = Generator(str(tmp_path), NOISE.run_seed, engine="vllm", max_rows=4)
    KEPT.append(generator)
    old_buckets, buckets = (list(buckets_of(model.state_dict(), 1 << 14)) for model in (old, new))
    generator.receive(0, 1 << 14, *old_buckets)
    generator.gate = Announcing({6: lambda: generator.receive(1, 1 << 14, *buckets)})
    found = generator.generate(requests(), settings, 0)
    assert generator.gate.futures[0].result(PATIENCE) == receipt_of(new, 1, 1 << 14)
    assert differences_of_a_push(found, old, new, settings) == 0
    generator.gate = Announcing({5: lambda: generator.receive(2, 1 << 14, *old_buckets[:-1], old_buckets[-1][:-4])})
    with pytest.raises(StaleWeights, match="a part"):
        generator.generate(requests(), settings, 1)
    generator.receive(2, 1 << 14, *old_buckets)
    expected = torch_engine.Engine(old).generate(requests(), settings, NOISE, 2)
    assert differences(generator.generate(requests(), settings, 2), expected) == 0


def test_what_is_not_served_is_refused(block):
    with pytest.raises(ValueError, match="guidance"):
        block.generate(requests(), sampler(guidance=1.0), NOISE)
    with pytest.raises(ValueError, match="cache"):
        block.generate(requests(), sampler(cache="dual"), NOISE)
    with pytest.raises(ValueError, match="blocks of 4"):
        block.generate(requests(), sampler(block_length=8, steps=8), NOISE)
    with pytest.raises(DataError, match="context"):
        block.generate(requests((95,)), sampler(), NOISE)
    with pytest.raises(UserError, match="from the one before"):
        vllm_engine.Engine(network(dream), layout="response", block_length=4)
    fields = llada.TINY | {"d_model": 32, "n_heads": 2}
    with pytest.raises(UserError, match="16 dimensions"):
        vllm_engine.Engine(llada.build(llada.Config.from_published(fields)))
    expected = torch_engine.Engine(block.model).generate(requests(), sampler(), NOISE)
    assert differences(block.generate(requests(), sampler(), NOISE), expected) == 0  # and the engine serves on
