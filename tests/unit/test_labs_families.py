"""The experiments about model families: each at its smallest, what they are made of, and verdicts that come out either way."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhub.models import llada
from rlhub.networks.layout import pack_layout
from rlhub.studies.lab import run_lab
from rlhub.studies.labs import block_masks, editing_repairs, moe_against_dense, packing_masks, passkey_ntk, shift_adapter

SMALLEST = {
    "block_masks": ["seeds=[0]", "rows=2", "length=6", "draws=1", "rollouts=2"],
    "shift_adapter": ["seeds=[0]", "width=16", "layers=1", "causal_steps=2", "steps=2", "batch_size=4", "problems=4"],
    "moe_against_dense": ["seeds=[0]", "width=16", "layers=1", "facts=16", "steps=2", "eval_every=1", "batch_size=4"],
    "editing_repairs": ["seeds=[0]", "width=16", "layers=1", "steps=2", "batch_size=4", "wrong=[2]", "problems=4"],
    "passkey_ntk": ["seeds=[0]", "layers=1", "heads=1", "steps=2", "batch_size=2", "times=[1,4]", "problems=2"],
    "packing_masks": [
        *("seeds=[0]", "layers=1", "heads=1", "steps=2", "batch_size=2", "post_steps=1", "post_batch_size=1", "documents=4"),
        *("times=[1,2]", "problems=2"),
    ],
}
SHIFTS = (0.0, 0.01, 0.02)  # of the results of three seeds


@pytest.mark.parametrize("name", SMALLEST)
def test_every_experiment_runs_at_its_smallest_and_leaves_its_files(name: str, tmp_path: Path):
    result = run_lab(name, [*SMALLEST[name], "parallel=1"], tmp_path)
    assert json.loads((tmp_path / "verdict.json").read_text()) == result
    assert result["outcome"] in ("holds", "does not hold", "undecided")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------ block_masks


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [({}, "holds"), ({"cache": 1e-3}, "does not hold"), ({"replay": 1e-3}, "does not hold"), ({"full": 1e-6}, "undecided")],
)
def test_block_masks_verdicts(changed, outcome):
    exact = {"loop": 1e-6, "cache": 1e-6, "replay": 1e-6, "full": 1.0, "shifted": 1.0}
    assert block_masks.judge({"llada2_seed0": exact, "sdar_seed0": exact | changed}).outcome == outcome


@pytest.mark.parametrize("family", block_masks.FAMILIES)
@torch.no_grad()
def test_masks_that_are_wrong_by_a_token_are_noticed(family: str):
    config = block_masks.Config(rows=2, draws=2)
    network = block_masks.tiny_network(family, 0)
    views = block_masks.noisy_views(config, network, 0)
    loop = block_masks.blockwise(views, block_masks.plain_pass(network))
    assert block_masks.largest(loop, block_masks.read(network, views, views.layout)) < block_masks.EXACT
    by_one = replace(views.layout, position_ids=views.layout.position_ids + 1)
    assert block_masks.largest(loop, block_masks.read(network, views, by_one)) > block_masks.VISIBLE


# ---------------------------------------------------------------------------------------------------------- shift_adapter


@pytest.mark.parametrize(
    ("gain", "wrong", "reload", "outcome"),
    [(0.1, 2.0, 0.0, "holds"), (-0.1, 2.0, 0.0, "does not hold"), (0.1, 2.0, 1e-6, "does not hold"), (0.1, 0.5, 0.0, "undecided")],
)
def test_shift_verdicts(gain, wrong, reload, outcome):
    def result(shift: float) -> dict:
        held_out = {"shift": {"shift": 0.2, "none": 0.2 + wrong}, "none": {"none": 0.2, "shift": 0.2 + wrong}}
        return {"curve": {"shift": [0.5, 0.5], "none": [0.5 + gain + shift] * 2}, "held_out": held_out, "reload": reload}

    assert shift_adapter.judge([result(shift) for shift in SHIFTS]).outcome == outcome


@torch.no_grad()
def test_the_shift_reads_the_position_before():
    config = shift_adapter.Config(width=16, layers=1)
    network = shift_adapter.tiny_dream(config, 0)
    tokens, layout = torch.randint(0, 10, (7,), generator=torch.Generator().manual_seed(0)), pack_layout([7])
    shifted, plain = (net.denoise(tokens, layout) for net in (network, shift_adapter.with_shift(network, 0)))
    torch.testing.assert_close(shifted[1:], plain[:-1])
    assert network.profile.logit_shift == 1


# ------------------------------------------------------------------------------------------------------ moe_against_dense


@pytest.mark.parametrize(
    ("gain", "load", "without", "outcome"),
    [(0.1, 1.4, 3.0, "holds"), (-0.1, 1.4, 3.0, "does not hold"), (0.1, 2.5, 3.0, "does not hold"), (0.1, 1.4, 1.45, "undecided")],
)
def test_moe_verdicts(gain, load, without, outcome):
    def curve(loss: float, load: float) -> list[dict]:
        return [{"step": [1, 2], "loss": [3.0, loss + shift], "load": [1.0, load], "routing": {}} for shift in SHIFTS]

    results = {"balanced": curve(1.0, load), "dense": curve(1.0 + gain, 1.0), "unbalanced": curve(1.0, without)}
    if gain > 0:
        results["dense"][0]["loss"][1] += 0.01
    assert moe_against_dense.judge(results).outcome == outcome


def test_both_networks_have_as_many_active_parameters():
    config = moe_against_dense.Config()
    sizes = {kind: sum(p.numel() for p in moe_against_dense.build(config, kind, 0).parameters()) for kind in ("balanced", "dense")}
    expert = 3 * config.width * config.expert_width
    router = config.width * (moe_against_dense.EXPERTS - 1)
    idle = expert * (moe_against_dense.EXPERTS - moe_against_dense.ACTIVE)
    assert sizes["balanced"] - sizes["dense"] == config.layers * (idle + router)
    keys, _ = moe_against_dense.facts(config, 0)
    assert len(np.unique(keys, axis=0)) == config.facts
    with pytest.raises(ValueError, match="1024 keys"):
        moe_against_dense.facts(replace(config, facts=2000), 0)


# -------------------------------------------------------------------------------------------------------- editing_repairs


@pytest.mark.parametrize(
    ("repaired", "control", "steps", "outcome"),
    [(0.9, 0.0, 3, "holds"), (0.05, 0.0, 3, "does not hold"), (0.9, 0.0, 17, "does not hold"), (0.9, 0.5, 3, "undecided")],
)
def test_editing_verdicts(repaired, control, steps, outcome):
    def results(accuracy: float) -> list[dict]:
        generated = {"edit": 1.0, "block": 1.0}
        return [{"repaired": {"edit": [accuracy - shift], "block": [0.0]}, "generated": generated, "post_steps": steps} for shift in SHIFTS]

    config = editing_repairs.Config(wrong=[2])
    assert editing_repairs.judge(config, {"corrupted": results(repaired), "right": results(control)}).outcome == outcome


def test_exactly_k_tokens_are_wrong():
    answers = np.random.default_rng(0).integers(0, 10, (50, editing_repairs.DIGITS))
    canvases = editing_repairs.with_wrong(answers, 3, np.random.default_rng(1))
    assert ((canvases != answers).sum(1) == 3).all()
    assert set(np.unique(canvases)) <= set(range(10))


def test_corruption_changes_what_is_visible_and_leaves_targets_masks_and_prompts():
    config = editing_repairs.Config(width=16, layers=1)
    network = editing_repairs.tiny_llada2(config, 0)
    clean, noisy = (editing_repairs.noisy_views(config, network, corruption, 0, 1) for corruption in (0.0, 0.5))
    assert torch.equal(clean.score_target, noisy.score_target)
    assert torch.equal(clean.tokens == network.mask_id, noisy.tokens == network.mask_id)
    changed = clean.tokens != noisy.tokens
    visible = (clean.tokens != network.mask_id) & (clean.layout.segment_ids == 1)
    assert not changed[~visible].any()
    assert changed[visible].float().mean().item() == pytest.approx(0.5 * 0.9, abs=0.1)


def test_a_rollout_goes_on_from_the_answer_that_is_given():
    config = editing_repairs.Config(width=16, layers=1)
    network = editing_repairs.tiny_llada2(config, 0).eval()
    prompts, answers = editing_repairs.digit_rows(3, 0, editing_repairs.TEST, 0)
    kept = editing_repairs.go_on(network, prompts, answers, editing_repairs.sampler_settings(config, "block"), 0)
    assert editing_repairs.exact(kept, answers) == 1
    eager = editing_repairs.sampler_settings(replace(config, editing_threshold=1e-6, max_post_steps=2), "edit")
    edited = editing_repairs.go_on(network, prompts, answers, eager, 0)
    assert editing_repairs.exact(edited, answers) == 0
    assert all(rollout.edits and rollout.num_forwards <= 2 for rollout in edited)


# ------------------------------------------------------------------------------------------------------------ passkey_ntk


@pytest.mark.parametrize(("aware", "none", "outcome"), [(0.9, 0.1, "holds"), (0.3, 0.1, "does not hold"), (0.9, 0.8, "undecided")])
def test_passkey_verdicts(aware, none, outcome):
    config = passkey_ntk.Config(times=[1, 16])
    results = [{"none": [1.0, none - shift], "ntk": [1.0, 0.8], "diffusion_ntk": [1.0, aware + shift]} for shift in SHIFTS]
    assert passkey_ntk.judge(config, results).outcome == outcome


def test_haystacks_hold_one_key_and_end_with_the_question():
    prompts, keys = passkey_ntk.haystacks(np.random.default_rng(0), 20, 64)
    assert prompts.shape == (20, 64 - passkey_ntk.KEY)
    assert ((prompts == passkey_ntk.MARK).sum(1) == 1).all() and (prompts[:, -1] == passkey_ntk.ASK).all()
    for prompt, key in zip(prompts, keys, strict=True):
        place = int(np.flatnonzero(prompt == passkey_ntk.MARK)[0])
        assert prompt[place + 1] == key
        assert (prompt < passkey_ntk.SYMBOLS).sum() == passkey_ntk.KEY
    first, last = passkey_ntk.haystacks(np.random.default_rng(0), 2, 64, np.array([0.0, 0.999]))[0]
    assert [int(np.flatnonzero(row == passkey_ntk.MARK)[0]) for row in (first, last)] == [0, 64 - 2 * passkey_ntk.KEY - 2]


def test_extended_networks_keep_their_weights_and_change_their_base():
    network = passkey_ntk.llada.build(passkey_ntk.network_config(1, 1)).initialize(torch.Generator().manual_seed(0))
    longer = {rule: passkey_ntk.extended(network, rule, 4) for rule in passkey_ntk.RULES}
    assert all(torch.equal(a, b) for net in longer.values() for a, b in zip(net.parameters(), network.parameters(), strict=True))
    assert [net.max_length for net in longer.values()] == [256] * 3
    thetas = [net.config.rope_theta / 10000 for net in longer.values()]
    assert thetas == pytest.approx([1, *passkey_ntk.FACTORS[4]], rel=0.03)


# ---------------------------------------------------------------------------------------------------------- packing_masks


@pytest.mark.parametrize(
    ("eod", "direct", "before", "others", "outcome"),
    [
        (0.8, 0.6, 0.5, 0.1, "holds"),
        (0.95, 0.6, 0.5, 0.1, "does not hold"),
        (0.6, 0.7, 0.5, 0.1, "does not hold"),
        (0.8, 0.6, 1.0, 0.1, "does not hold"),
        (0.8, 0.6, 0.5, 0.6, "undecided"),
    ],
)
def test_packing_verdicts(eod, direct, before, others, outcome):
    config = packing_masks.Config(times=[1, 4])
    longer = {"adaptive": 0.8, "eod": eod, "direct": direct, packing_masks.BEFORE: before, packing_masks.CONTROL: others}
    results = [{kind: [1.0, value + shift * value] for kind, value in longer.items()} for shift in SHIFTS]
    assert packing_masks.judge(config, results).outcome == outcome


@pytest.mark.parametrize("swapped", [False, True])
def test_documents_of_unequal_lengths_ask_for_their_own_key_or_for_that_of_the_next(swapped: bool):
    documents = packing_masks.documents(packing_masks.Config(documents=200), 0, swapped)
    lengths = [len(document) for document in documents]
    assert min(lengths) >= packing_masks.LEAST and max(lengths) <= 8 * passkey_ntk.TRAINED and len(set(lengths)) > 50
    assert np.median(lengths) == pytest.approx((packing_masks.LEAST * 8 * passkey_ntk.TRAINED) ** 0.5, rel=0.15)
    keys = [document[document < passkey_ntk.SYMBOLS][: passkey_ntk.KEY] for document in documents]
    asked = [document[-passkey_ntk.KEY :] for document in documents]
    np.testing.assert_array_equal(asked, np.roll(keys, -1, axis=0) if swapped else keys)


def test_post_training_differs_in_packing_only_and_the_control_in_answers_only():
    config = packing_masks.Config(documents=20)
    kinds = {kind: packing_masks.packed(config, kind, 0) for kind in (*packing_masks.PACKINGS, packing_masks.CONTROL)}
    stream = {kind: rows.epoch(0)[0] for kind, rows in kinds.items()}
    eos_id, control = kinds["eod"].eos_id, stream[packing_masks.CONTROL]
    np.testing.assert_array_equal(stream["adaptive"], stream["direct"])
    np.testing.assert_array_equal(stream["eod"][stream["eod"] != eos_id], stream["direct"])
    assert (stream["eod"] == eos_id).sum() == 20
    separated = {kind for kind, rows in kinds.items() if rows.batch(1, 2).segments is not None}
    assert separated == {"adaptive", packing_masks.CONTROL}
    questions = np.flatnonzero(control == passkey_ntk.ASK)
    changed = set(np.flatnonzero(control != stream["adaptive"]))
    assert changed and changed <= {int(place) + 1 for place in questions}


def test_post_training_hides_and_scores_the_key_after_each_question_and_nothing_else():
    rows = packing_masks.packed(packing_masks.Config(documents=40), "eod", 0)
    batch, profile = rows.batch(1, 3), llada.build(passkey_ntk.network_config(1, 1)).profile
    views = packing_masks.answer_views(batch, profile)
    clean = np.concatenate(batch.completions)
    places = np.flatnonzero(views.tokens.numpy() != clean)
    assert len(places) > 3 and (clean[places - 1] == passkey_ntk.ASK).all() and (views.tokens[places] == profile.mask_id).all()
    assert views.score_target.tolist() == clean[places].tolist()
    assert len(places) == sum((tokens[:-1] == passkey_ntk.ASK).sum() for tokens in batch.completions)
