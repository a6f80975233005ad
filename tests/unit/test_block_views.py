"""Views of block-causal models: [clean | noisy] rows, the sum of the blocks' ELBOs, and replays of the sampler's states."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhub.algorithm.scoring import token_log_probs
from rlhub.config.recipe import load_recipe
from rlhub.likelihoods import sequence_draws
from rlhub.models import sdar
from rlhub.models.llada import Config, LLaDA
from rlhub.networks.layout import pack_layout
from rlhub.noise import Noise, Quantity
from rlhub.planning.plan import make_plan
from rlhub.types import NEVER, Batch, Credit
from rlhub.views import all_masks, coupled, elbo, model_blocks, prefix, supervised, trajectory
from rlhub.views._rows import NoisyRow, build_views

RECIPES = Path(__file__).parents[2] / "recipes"
BLOCK = 4
PROMPT = [3, 7, 5, 2, 9, 11]  # its last two tokens share a block with the answer
ANSWER = [4, 8, 2, 6, 12, 10, 3]
CREDIT = Credit(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool))


@pytest.fixture(scope="module")
def network():
    config = sdar.Config.from_published({**sdar.TINY, "mask_token_id": 1, "eos_token_id": 0})
    built = sdar.build(config).initialize(torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # laws far from uniform, so that a wrong mask shows
        for parameter in built.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return built


def batch_of(prompt=PROMPT, answer=ANSWER, uid=0, **fields) -> Batch:
    zero = np.zeros(1, dtype=np.int64)
    return Batch(
        uid=np.array([uid], dtype=np.uint64),
        group=zero,
        prompts=[np.array(prompt, dtype=np.int32)],
        completions=[np.array(answer, dtype=np.int32)],
        response_length=np.array([len(answer)]),
        scored_length=np.array([len(answer)]),
        rewards=np.ones((1, 1)),
        member=zero,
        **fields,
    )


@torch.no_grad()
def whole_row(network, tokens: list[int]) -> torch.Tensor:
    """Log-probs [T, V] of one plain row."""
    hidden = network.denoise(torch.tensor(tokens), pack_layout([len(tokens)]))
    return network.head(hidden, torch.arange(len(tokens))).log_softmax(-1)


def block_loop(network, masked: np.ndarray) -> np.ndarray:
    """Log-prob of each masked answer token, from one pass per block: earlier blocks clean, this one noisy, nothing behind it."""
    clean = np.array(PROMPT + ANSWER)
    noisy = clean.copy()
    noisy[len(PROMPT) :][masked] = network.mask_id
    found = np.zeros(len(ANSWER))
    for start in range(0, len(clean), BLOCK):
        row = np.concatenate([clean[:start], noisy[start : start + BLOCK]])
        law = whole_row(network, row.tolist())
        for position in range(max(start, len(PROMPT)), len(row)):
            found[position - len(PROMPT)] = law[position, clean[position]]
    return np.where(masked, found, 0.0)


@pytest.fixture(scope="module")
def table(network) -> dict[tuple[int, int], np.ndarray]:
    """Log-probs of the tokens of each block by (block, mask code), from one pass per block and mask."""
    blocks = model_blocks(batch_of(), 0, network.profile)
    entries = {}
    for number, block in enumerate(blocks):
        for code in range(1, 2 ** (block.stop - block.start)):
            masked = np.zeros(len(ANSWER), dtype=bool)
            masked[block] = code >> np.arange(block.stop - block.start) & 1
            entries[number, code] = block_loop(network, masked)[block]
    return entries


def exact(table, number: int, size: int) -> float:
    """The ELBO of one block by its definition: the mean over counts l and sets of that size of (L / l) sum of log-probs."""
    total = 0.0
    for count in range(1, size + 1):
        sets = [sum(1 << place for place in chosen) for chosen in itertools.combinations(range(size), count)]
        total += sum(table[number, code].sum() for code in sets) / len(sets) * size / count / size
    return total


def test_blocks_count_from_the_prompts_first_token(network):
    blocks = model_blocks(batch_of(), 0, network.profile)
    assert [(block.start, block.stop) for block in blocks] == [(0, 2), (2, 6), (6, 7)]
    assert [(block.start, block.stop) for block in model_blocks(batch_of(prompt=[1] * 8), 0, network.profile)] == [(0, 4), (4, 7)]
    full = LLaDA(Config(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16))
    assert model_blocks(batch_of(), 0, full.profile) == [slice(0, 7)]


def test_one_pass_over_clean_and_noisy_equals_a_pass_per_block(network):
    generator = np.random.default_rng(0)
    masks = [generator.random(len(ANSWER)) < share for share in (0.2, 0.5, 0.8, 1.1)]
    masks = [mask for mask in masks if mask.any()]
    rows = [NoisyRow(0, draw, mask, clean_before=True) for draw, mask in enumerate(masks)]
    views = build_views(batch_of(), rows, len(rows), network.profile)
    assert views.layout.attention == "block_diffusion"
    got = token_log_probs(network, views, 10_000)
    expected = np.concatenate([block_loop(network, mask)[mask] for mask in masks])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    plain = build_views(batch_of(), [replace(row, clean_before=False) for row in rows], len(rows), network.profile)
    assert np.abs(token_log_probs(network, plain, 10_000).numpy() - expected).max() > 1e-2, "noise of earlier blocks must matter"


def test_all_masks_are_the_blocks_elbos(network, table):
    views = all_masks.make(batch_of(), CREDIT, all_masks.Config(), Noise(0).stream("views"), 0, network.profile)
    value = sequence_draws(token_log_probs(network, views, 10_000).double(), views)
    assert value.item() == pytest.approx(sum(exact(table, number, size) for number, size in enumerate((2, 4, 1))), abs=1e-4)
    assert views.num_rows == 2**4 - 1


def test_each_blocks_elbo_is_a_lower_bound(network, table):
    """Of the block's probability when its tokens are revealed one by one in a random order."""
    for number, size in enumerate((2, 4, 1)):
        orders = []
        for order in itertools.permutations(range(size)):
            hidden, total = (1 << size) - 1, 0.0
            for place in order:
                total += table[number, hidden][place]
                hidden &= ~(1 << place)
            orders.append(total)
        assert exact(table, number, size) == pytest.approx(np.mean(orders), abs=1e-4), "the mean over orders"
        assert exact(table, number, size) <= math.log(np.mean(np.exp(orders))) + 1e-6


@pytest.mark.parametrize(("module", "levels"), [(elbo, "independent"), (elbo, "stratified"), (coupled, "independent"), (supervised, None)])
def test_estimates_are_unbiased(network, table, module, levels):
    """4000 samples of two draws, whose log-probs are looked up."""
    options = {} if levels is None else {"levels": levels}
    one = batch_of()
    size = 4000
    batch = replace(
        one,
        uid=np.arange(size, dtype=np.uint64),
        group=np.arange(size),
        prompts=one.prompts * size,
        completions=one.completions * size,
        response_length=np.repeat(one.response_length, size),
        scored_length=np.repeat(one.scored_length, size),
        rewards=np.ones((size, 1)),
        member=np.zeros(size, dtype=np.int64),
    )
    views = module.make(batch, CREDIT, module.Config(draws=2, **options), Noise(1).stream("views"), 0, network.profile)
    blocks = model_blocks(one, 0, network.profile)
    code = np.zeros((views.num_rows, len(blocks)), dtype=np.int64)
    row, token = views.score_row.numpy(), views.score_token.numpy()
    block_of = np.repeat(np.arange(len(blocks)), [block.stop - block.start for block in blocks])
    place = token - np.array([block.start for block in blocks])[block_of[token]]
    np.add.at(code, (row, block_of[token]), 1 << place)
    log_prob = [table[block_of[t], code[r, block_of[t]]][p] for r, t, p in zip(row, token, place, strict=True)]
    value = sequence_draws(torch.tensor(log_prob, dtype=torch.float64), views).mean(1)
    expected = sum(exact(table, number, len_) for number, len_ in enumerate((2, 4, 1)))
    error = value.std().item() / size**0.5
    assert abs(value.mean().item() - expected) < 4 * error and error < 0.05 * abs(expected)


def test_the_noise_of_a_block_is_its_own(network):
    views = elbo.make(batch_of(), CREDIT, elbo.Config(draws=64), Noise(0).stream("views"), 0, network.profile)
    hidden = np.zeros((64, len(ANSWER)), dtype=bool)
    hidden[views.score_row, views.score_token] = True
    middle = hidden[:, 2:6].sum(1)
    assert set(middle.tolist()) == {1, 2, 3, 4} and hidden[:, 6].all(), "a block of one token is always hidden"
    assert abs(np.corrcoef(hidden[:, 0], hidden[:, 2])[0, 1]) < 0.4


def test_full_attention_is_as_it_was():
    network = LLaDA(Config(d_model=16, n_layers=1, n_heads=2, mlp_hidden_size=16))
    views = elbo.make(batch_of(), CREDIT, elbo.Config(draws=4), Noise(0).stream("views"), 0, network.profile)
    assert views.layout.attention == "full" and views.layout.lengths.tolist() == [13] * 4
    for draw in range(4):
        stream = Noise(0).stream("views")
        count = 1 + min(int(stream.uniform(1, draw=draw, quantity=Quantity.LEVEL)[0] * 7), 6)
        expected = stream.subset(7, count, draw=draw)
        assert (views.score_token[views.score_draw == draw].numpy() == np.flatnonzero(expected)).all()
        assert (views.score_weight[views.score_draw == draw] == np.float32(7 / count)).all()


@pytest.mark.parametrize("steps", [[0, 1, 3, 2, 4, 5, 6], [0, 0, 1, 1, 2, NEVER, 3]])
def test_trajectory_rows_are_the_samplers_states(network, steps):
    """Each step's log-probs equal those of a pass over the whole canvas as the sampler saw it."""
    steps = np.array(steps, dtype=np.int16)
    views = trajectory.make(batch_of(unmask_step=[steps]), CREDIT, trajectory.Config(), Noise(0).stream("views"), 0, network.profile)
    got = token_log_probs(network, views, 10_000).numpy()
    expected = []
    for row in range(views.num_rows):
        step = int(views.step[row])
        state = np.where((steps == NEVER) | (steps >= step), network.mask_id, ANSWER)
        law = whole_row(network, PROMPT + state.tolist())[len(PROMPT) :]
        expected += [law[place, ANSWER[place]].item() for place in np.flatnonzero(steps == step)]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert views.layout.lengths.max() == len(PROMPT + ANSWER) and views.layout.lengths[0] == 8, "blocks behind the step are left out"


def test_prefix_rows_are_the_chain_rule(network):
    views = prefix.make(batch_of(), CREDIT, prefix.Config(), Noise(0).stream("views"), 0, network.profile)
    got = token_log_probs(network, views, 10_000).numpy()
    for place in range(len(ANSWER)):
        row = PROMPT + ANSWER[:place] + [network.mask_id] * (len(ANSWER) - place)
        assert got[place] == pytest.approx(whole_row(network, row)[len(PROMPT) + place, ANSWER[place]].item(), abs=1e-5)


@pytest.mark.parametrize(("views", "proxy"), [("coupled", False), ("full_mask", True), ("quadrature", True), ("trajectory", False)])
def test_plans_say_what_is_a_proxy(views, proxy):
    shape = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, head_dim: 16, intermediate_size: 32}"
    family = ["model.family=sdar", f"model.config={shape}", "sampler.block_length=4"]
    notes = make_plan(load_recipe(RECIPES / "sort.yaml", [*family, f"algorithm.views={{name: {views}}}"])).notes
    assert any("block-causal, blocks of 4" in note for note in notes)
    assert any(f"views {views} mask all blocks at once" in note and "proxy" in note for note in notes) == proxy
    assert not any("block-causal" in note for note in make_plan(load_recipe(RECIPES / "sort.yaml")).notes)
