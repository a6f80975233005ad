"""What every model family must do, over all that are found in `rlhub.models`: a new file there is tested by being there."""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rlhub
import rlhub.models
from rlhub.algorithm.batching import make_batch
from rlhub.checkpoints.adapters import write_fresh_adapter
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig, KLConfig, LearnerConfig, OptimizerConfig
from rlhub.networks.cache import CacheView
from rlhub.networks.layout import pack_layout
from rlhub.networks.profile import Profile
from rlhub.types import Layout, RewardResult
from workers.learner import Learner
from workers.scorer import Scorer

MODULES = [importlib.import_module(f"rlhub.models.{info.name}") for info in pkgutil.iter_modules(rlhub.models.__path__)]
FAMILIES = [module for module in MODULES if hasattr(module, "ARCHITECTURES")]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda module: module.__name__.rpartition(".")[2])
def network(request) -> torch.nn.Module:
    """A small network whose weights are large enough for every part of it to matter."""
    module, random = request.param, torch.Generator().manual_seed(3)
    network = module.build(module.Config.from_published(module.TINY)).initialize(random).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.3 if parameter.dim() > 1 else 0.1)
    return network


@pytest.fixture
def folder(network, tmp_path) -> Path:
    save_network(network, tmp_path / "model")
    return tmp_path / "model"


def tokens_of(network, *lengths: int, seed: int = 0) -> torch.Tensor:
    """Rows with about half of their tokens hidden."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(network.vocab_size, (sum(lengths),), generator=random)
    return torch.where(torch.rand(len(tokens), generator=random) < 0.5, network.mask_id, tokens)


def blocks_of(network) -> int:
    return network.profile.block_length or 4


def at(layout: Layout, positions: torch.Tensor) -> Layout:
    """A layout of one row with these position ids."""
    none = torch.zeros(len(positions), dtype=torch.int32)
    return replace(
        pack_layout([len(positions)]), position_ids=positions.int(), segment_ids=none, block_ids=none, attention=layout.attention
    )


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding; -inf, the logit of a token that is never predicted, equals itself."""
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------------------ contract


def test_profile_and_names(network):
    profile = network.profile
    assert isinstance(profile, Profile)
    assert (profile.mask_id, profile.eos_id) == (network.mask_id, network.eos_id) and profile.eos_id in profile.stop_ids
    assert 0 <= network.mask_id < network.vocab_size and (profile.block_length is None) == (profile.attention == "full")
    config = network.config
    assert type(config).from_published(json.loads(json.dumps(config.to_published()))).to_published() == config.to_published()
    assert config.max_length == network.max_length


@torch.no_grad()
def test_saved_and_loaded_gives_the_same_logits(network, folder):
    tokens, layout = tokens_of(network, 9, 12), pack_layout([9, 12])
    loaded = load_network(folder)
    assert torch.equal(loaded.head(loaded.denoise(tokens, layout)), network.head(network.denoise(tokens, layout)))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 9, 13, 13), (5, 12, 8, 1)], ids=str)
def test_packed_rows_equal_single_rows(network, lengths):
    tokens = tokens_of(network, *lengths)
    packed = network.head(network.denoise(tokens, pack_layout(lengths)))
    alone = [network.head(network.denoise(row, pack_layout([len(row)]))) for row in tokens.split(lengths)]
    assert packed[:, 2].std() > 0.1
    close(packed, torch.cat(alone))


@torch.no_grad()
def test_segments_equal_rows(network):
    """Documents that share a row, positions counted anew, see what rows of their own would; interleaved segments do too."""
    tokens, lengths = tokens_of(network, 12, 5, 8), (12, 5, 8)
    rows = pack_layout(lengths)
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int()
    packed = replace(rows, segment_ids=segment, row_offsets=torch.tensor([0, 25], dtype=torch.int32))
    expected = network.denoise(tokens, rows)
    close(network.denoise(tokens, packed), expected)
    if not network.profile.logit_shift:  # which needs the token before beside each token
        order = torch.randperm(25, generator=torch.Generator().manual_seed(1))
        mixed = replace(packed, position_ids=rows.position_ids[order], segment_ids=segment[order])
        close(network.denoise(tokens[order], mixed), expected[order])


@pytest.mark.parametrize("lengths", [(9, 9, 9), (5, 12, 8, 2)], ids=str)
@pytest.mark.parametrize("wanted", [[3, 1, 20, 11, 11, 9], [26], [0, 10], [], list(range(27))], ids=str)
def test_targets_equal_rows_of_the_whole(network, lengths, wanted):
    """In any order, repeated, one, none, all; values and gradients."""
    tokens, layout = tokens_of(network, *lengths), pack_layout(lengths)
    targets = torch.tensor(wanted, dtype=torch.int64)
    hidden = network.denoise(tokens, layout)
    some = network.denoise(tokens, layout, targets=targets)
    assert some.shape == (len(wanted), hidden.shape[1])
    close(some, hidden[targets], 2e-6)
    close(network.head(some), network.head(hidden, targets))
    if wanted:
        parameters = list(network.parameters())
        gradients = [torch.autograd.grad(part.square().sum(), parameters, allow_unused=True) for part in (some, hidden[targets])]
        for ours, plain in zip(*gradients, strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None:
                assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-6


def test_a_gradient_changes_no_bit(network):
    tokens, layout, targets = tokens_of(network, 9, 9, 5), pack_layout([9, 9, 5]), torch.tensor([2, 3, 12, 22])
    for wanted in (None, targets):
        with torch.no_grad():
            frozen = network.denoise(tokens, layout, targets=wanted)
        assert torch.equal(network.denoise(tokens, layout, targets=wanted), frozen)


@torch.no_grad()
def test_one_row_more_or_less_in_a_product_changes_nothing(network):
    tokens, layout = tokens_of(network, 9, 9), pack_layout([9, 9])
    both = network.denoise(tokens, layout, targets=torch.tensor([4, 13]))
    assert torch.equal(network.head(both[:1]), network.head(both)[:1])
    close(network.denoise(tokens[:1], pack_layout([1])), network.denoise(tokens[[0, 5]], pack_layout([1, 1]))[:1], 0)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["full", "block_causal", "block_diffusion"])
def test_flex_equals_sdpa(network, attention, monkeypatch):
    if network.config.MODEL_TYPE not in ("sdar", "Dream"):
        pytest.skip("the kernels are shared; one block-causal and one full family with grouped queries are enough")
    tokens, layout = tokens_of(network, 9, 12, 12), pack_layout([9, 12, 12], attention)
    layout = replace(layout, block_ids=layout.position_ids // 4, segment_ids=(layout.position_ids >= 6).int())
    if attention == "block_diffusion" and network.profile.logit_shift:
        with pytest.raises(ValueError, match="block_diffusion"):
            network.denoise(tokens, layout)
        return
    targets = torch.tensor([1, 2, 30, 12])
    expected = network.denoise(tokens, layout), network.denoise(tokens, layout, targets=targets)
    monkeypatch.setattr(network, "attention", "flex")
    close(network.denoise(tokens, layout), expected[0])
    close(network.denoise(tokens, layout, targets=targets), expected[1])


@torch.no_grad()
def test_unknown_and_missing_backends_are_named(network, monkeypatch):
    tokens, layout = tokens_of(network, 4), pack_layout([4])
    monkeypatch.setattr(network, "attention", "fast")
    with pytest.raises(ValueError, match="attention 'fast' is unknown; choose one of sdpa, flex, flash"):
        network.denoise(tokens, layout)
    monkeypatch.setattr(network, "attention", "flash")
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    with pytest.raises(rlhub.errors.UserError, match="pip install flash-attn"):
        network.denoise(tokens, layout)


@torch.no_grad()
def test_block_causal_tokens_see_no_later_block(network):
    """Under the rule, which block-causal families follow by themselves; full attention would see a change anywhere."""
    size = blocks_of(network)
    tokens = tokens_of(network, 3 * size + 1)
    own = network.profile.attention == "block_causal"
    layout = pack_layout([len(tokens)], "full" if own else "block_causal")
    layout = layout if own else replace(layout, block_ids=layout.position_ids // size)
    before = network.denoise(tokens, layout)
    changed = tokens.clone()
    changed[2 * size] = (tokens[2 * size] + 1) % network.vocab_size
    after = network.denoise(changed, layout)
    assert torch.equal(after[: 2 * size], before[: 2 * size])
    assert (after[2 * size + 1 :] - before[2 * size + 1 :]).abs().amax(1).min() > 1e-3, "a token sees all of its block and what follows"


@torch.no_grad()
def test_block_diffusion_equals_a_loop_over_blocks(network):
    """[clean | noisy] in one row against each noisy block behind its clean prefix, in one pass each."""
    if network.profile.logit_shift:
        pytest.skip("not defined with a logit shift")
    size = blocks_of(network)
    length = 3 * size - 1
    clean, noisy = torch.randint(network.vocab_size, (length,), generator=torch.Generator().manual_seed(1)), tokens_of(network, length)
    position = torch.arange(length).repeat(2)
    layout = replace(
        pack_layout([2 * length], "block_diffusion"),
        position_ids=position.int(),
        segment_ids=torch.arange(2).repeat_interleave(length).int(),
        block_ids=(position // size).int(),
    )
    both = network.denoise(torch.cat([clean, noisy]), layout)
    plain = pack_layout([length], "block_causal")
    plain = replace(plain, block_ids=plain.position_ids // size)
    close(both[:length], network.denoise(clean, plain))
    for begin in range(0, length, size):
        end = min(begin + size, length)
        row = torch.cat([clean[:begin], noisy[begin:end]])
        layout_of_row = replace(pack_layout([end], "block_causal"), block_ids=torch.arange(end).int() // size)
        close(both[length + begin : length + end], network.denoise(row, layout_of_row)[begin:])


# --------------------------------------------------------------------------------------------------------------------- cache


@torch.no_grad()
def test_a_refreshed_cache_equals_no_cache(network):
    """Right after a full forward that filled it, a block run alone has the logits it had; slots are any, targets too."""
    lengths = (9, 14, 14, 6)
    tokens, layout = tokens_of(network, *lengths), pack_layout(lengths)
    cache = network.new_cache(6, 16)
    slots = torch.tensor([4, 0, 5, 2])
    expected = network.denoise(tokens, layout)
    close(network.denoise(tokens, layout, cache=CacheView(cache, slots)), expected)
    starts = layout.row_offsets.tolist()
    for row in (2, 1, 3):
        size = lengths[row]
        block = torch.arange(max(size - 5, 0), size)
        part = at(layout, block)
        wanted = torch.arange(1, len(block))  # the first one's predecessor, which a logit shift needs, is not among the tokens
        again = network.denoise(tokens[starts[row] + block], part, targets=wanted, cache=CacheView(cache, slots[row : row + 1]))
        close(again, expected[starts[row] + block[wanted]])
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes + cache.blocks.nbytes > 0


@torch.no_grad()
def test_a_cache_that_was_not_refreshed_is_stale(network):
    """Full attention: what was stored of other tokens answers; block-causal: nothing that is stored sees the new block."""
    tokens, changed = tokens_of(network, 12), tokens_of(network, 12, seed=5)
    full = network.profile.attention == "full"
    begin = 4 if full else 12 // blocks_of(network) // 2 * blocks_of(network)
    changed[:begin] = tokens[:begin]
    if torch.equal(tokens, changed) or not begin:
        pytest.skip("one block only")
    cache, layout, positions = network.new_cache(1, 12), pack_layout([12]), torch.arange(begin - 1, 12)
    view = CacheView(cache, torch.tensor([0]))
    network.denoise(tokens, layout, cache=view)
    stale = network.denoise(changed[positions], at(layout, positions), cache=view)[1:]
    exact = network.denoise(changed, layout)[begin:]
    assert ((stale - exact).abs().max() > 1e-3) == full


@torch.no_grad()
def test_a_prompt_is_shared_with_its_group_and_blocks_follow(network):
    """Block-causal decoding with a cache against forwards without: a prompt run once and copied, then a block's clean tokens and the
    next noisy block in one call, rows at different blocks side by side."""
    if network.profile.attention != "block_causal":
        pytest.skip("exact for block-causal families only")
    size, prompt_length = blocks_of(network), 2 * blocks_of(network)
    prompt = tokens_of(network, prompt_length)
    texts = [torch.cat([prompt, tokens_of(network, 3 * size, seed=seed)]) for seed in (1, 2, 3)]
    cache = network.new_cache(5, 5 * size)
    network.denoise(tokens_of(network, 4 * size, seed=9), pack_layout([4 * size]), cache=CacheView(cache, torch.tensor([3])))
    network.denoise(prompt, pack_layout([prompt_length]), targets=prompt[:0].long(), cache=CacheView(cache, torch.tensor([1])))
    cache.copy(1, torch.tensor([3, 4]), prompt_length)
    slots, expected = torch.tensor([1, 3, 4]), [network.denoise(text, pack_layout([5 * size])) for text in texts]
    # In blocks: rows of different length, with one and two blocks at once.
    for spans in ([(2, 3), (2, 4), (2, 4)], [(3, 5), (4, 5), (4, 5)]):
        positions = [torch.arange(first * size, last * size) for first, last in spans]
        layout = replace(pack_layout([len(part) for part in positions]), position_ids=torch.cat(positions).int())
        given = torch.cat([text[part] for text, part in zip(texts, positions, strict=True)])
        found = network.denoise(given, layout, cache=CacheView(cache, slots))
        close(found, torch.cat([hidden[part] for hidden, part in zip(expected, positions, strict=True)]))


def test_misuse_of_a_cache_is_named(network):
    cache, tokens = network.new_cache(1, 8), tokens_of(network, 9)
    view = CacheView(cache, torch.tensor([0]))
    with pytest.raises(ValueError, match="no_grad"):
        network.denoise(tokens, pack_layout([9]), cache=view)
    with torch.no_grad(), pytest.raises(ValueError, match="position 8 is beyond the cache of 8 positions"):
        network.denoise(tokens, pack_layout([9]), cache=view)
    if network.profile.logit_shift:
        part = at(pack_layout([3]), torch.arange(4, 7))
        with torch.no_grad(), pytest.raises(ValueError, match="position 3 predicts the next one"):
            network.denoise(tokens[4:7], part, targets=torch.tensor([0]), cache=view)


# ------------------------------------------------------------------------------------------------- likelihood, sampler, learner


def words(network, count: int) -> list[int]:
    """Token ids that are neither mask nor EOS."""
    return [token for token in range(network.vocab_size) if token not in (network.mask_id, network.eos_id)][:count]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_likelihood_sampler_and_learner_run_unchanged(network, folder, adapters):
    """ELBO, rollouts and an ESPO step, with nothing said about the family; the reported ELBO agrees with an exact one."""
    if adapters:
        base, folder = folder, folder.parent / "adapter"
        write_fresh_adapter(base, folder, 2, 8.0, "auto", torch.Generator().manual_seed(0))
    model = rlhub.load_model(folder)
    size = blocks_of(network)
    prompt, answer = words(network, 5), words(network, 3)
    exact = rlhub.log_likelihood(model, prompt, answer, views="exact")
    estimate = rlhub.log_likelihood(model, prompt, answer, views="elbo", draws=400)
    assert exact.value < 0 and abs(estimate.value - exact.value) < 5 * estimate.standard_error + 1e-4
    settings = {"length": 2 * size, "steps": 2 * size, "block_length": size}
    rollouts = rlhub.generate(model, [prompt, prompt[:3]], temperature=1.0, **settings)
    alone = rlhub.generate(model, [prompt], temperature=1.0, **settings)[0]
    np.testing.assert_array_equal(rollouts[0].completion_ids, alone.completion_ids)
    assert all((rollout.completion_ids != network.mask_id).all() for rollout in rollouts)
    rollouts = [replace(rollout, uid=uid, group_uid=uid // 2) for uid, rollout in enumerate([*rollouts, *rollouts])]
    graded = [rollout.graded(RewardResult(float(uid % 2))) for uid, rollout in enumerate(rollouts)]
    learner = Learner(str(folder), LearnerConfig(backend="torch", micro_batch_tokens=64), 0)
    learner.begin(AlgorithmConfig(), OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 1)
    trained = {name: weight.clone() for name, weight in learner.network.named_parameters() if weight.requires_grad}
    fixed = {name: tensor.clone() for name, tensor in learner.network.state_dict().items() if name not in trained}
    metrics = learner.step(learner.algorithm.credited(make_batch(graded, scored_length="canvas")))
    assert 0 < metrics["grad_norm"] < float("inf")
    after = learner.network.state_dict()
    moved = [name for name in trained if not torch.equal(after[name], trained[name])]
    # In a fresh adapter, whose second factor is 0, only that one has a gradient; experts that no token took have none.
    assert len(moved) > (0.45 if adapters else 0.8) * len(trained)
    assert all(torch.equal(after[name], tensor) for name, tensor in fixed.items())
    assert all("lora" in name for name in trained) == adapters


@pytest.mark.parametrize("shared_noise", [True, False], ids=["shared noise", "own noise"])
def test_the_base_without_its_adapter_is_the_reference_that_a_scorer_holds(network, folder, shared_noise):
    """One step with either: the same KL to 0.0 nats and the same weights, so the same views of the same batch."""
    adapter, random = folder.parent / "adapter", torch.Generator().manual_seed(0)
    write_fresh_adapter(folder, adapter, 2, 8.0, "auto", random)
    settings = {"length": 2 * blocks_of(network), "steps": 2 * blocks_of(network), "block_length": blocks_of(network)}
    rollouts = rlhub.generate(rlhub.load_model(folder), [words(network, 5)] * 4, temperature=1.0, **settings)
    graded = [replace(one, uid=uid, group_uid=0).graded(RewardResult(float(uid % 2))) for uid, one in enumerate(rollouts)]
    batch = make_batch(graded, scored_length="canvas")

    def trained(reference: str) -> tuple[dict[str, float], list[torch.Tensor]]:
        algorithm = AlgorithmConfig(reference=reference, shared_noise=shared_noise, kl=KLConfig(kind="k2", coefficient=0.1))
        learner = Learner(str(adapter), LearnerConfig(backend="torch", micro_batch_tokens=64), 0)
        learner.begin(algorithm, OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 1)
        weights = [weight for weight in learner.network.parameters() if weight.requires_grad]
        with torch.no_grad():  # an adapter that does something
            for number, weight in enumerate(weights):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)), alpha=0.3)
        credited = learner.algorithm.credited(batch)
        views, scorer = learner.make_views(credited), Scorer(str(folder), 64)
        scores = [] if reference == "adapter_off" else [scorer.score(views) if shared_noise else scorer.estimate(algorithm, 0, credited)]
        return learner.step(credited, views, *scores), weights

    (mine, weights), (theirs, others) = trained("adapter_off"), trained("frozen")
    assert mine["kl"] > 0.01 and mine == theirs
    assert all(map(torch.equal, weights, others))
