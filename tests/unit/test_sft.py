"""Supervised training: what counts of an answer, how it is hidden, and how the loss weighs it, each against formulas written out here."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.pairs import Pairs
from rlhub.checkpoints.weights import save_network
from rlhub.config.schema import AlgorithmConfig, SFTConfig
from rlhub.errors import DataError, RecipeError
from rlhub.models import dream, llada
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.records.metrics import read_metrics
from rlhub.tasks import load_task, task_tokenizer
from rlhub.tasks._vocabulary import word_level
from rlhub.training.documents import PackedDocuments
from rlhub.training.run import train
from rlhub.training.supervised import (
    cut_at_random,
    demonstration_batch,
    family_weight,
    supervised_algorithm,
    supervised_batch,
    whole_sequences,
    with_ending,
)
from rlhub.types import Batch
from rlhub.views import elbo, supervised

MASK, EOS = 30, 31
PROFILE = Profile(mask_id=MASK, eos_id=EOS, stop_ids=(EOS,), pad_id=EOS, lora_targets="")
ALONE = ["run.phases=[sft]", "task.reward={name: none}", "roles={generators: 0, scorers: 0, reward_workers: 0}"]
P = 0.3  # Dream's


def batch_of(answers, prompts=None, canvas: int = 0) -> Batch:
    """Answers with their EOS, padded with EOS to the canvas."""
    size = len(answers)
    ended = [[*answer, EOS] for answer in answers]
    length = np.array([len(answer) for answer in ended])
    completions = [np.array(answer + [EOS] * (canvas - len(answer)), dtype=np.int32) for answer in ended]
    return Batch(
        uid=np.arange(size, dtype=np.uint64),
        group=np.arange(size),
        prompts=[np.array(prompt, dtype=np.int32) for prompt in (prompts or [[1, 2]] * size)],
        completions=completions,
        response_length=length,
        scored_length=np.array([len(completion) for completion in completions]),
        rewards=np.ones((size, 1)),
        member=np.zeros(size, dtype=np.int64),
    )


def loss_of(config: SFTConfig, batch: Batch, family: str = "inverse_t"):
    """(loss, views, log-probs) of the algorithm that the recipe's keys make, with random log-probs."""
    algorithm = Algorithm.compose(supervised_algorithm(config, family))
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, PROFILE)
    log_prob = -torch.rand(len(views.score_row), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    loss, _ = algorithm.loss(algorithm.scores(LogProbs(log_prob), views, batch, credit), credit)
    return loss.item(), views, log_prob.numpy()


# -------------------------------------------------------------------------------------------------------------- what counts


def test_endings():
    batch = batch_of([[5, 6, 7], [8]], canvas=6)
    for policy, spans in {"auto": [6, 6], "loss": [6, 6], "first": [4, 2], "none": [3, 1]}.items():
        assert with_ending(batch, policy, EOS, 6).scored_length.tolist() == spans, policy
    unpadded = batch_of([[5, 6, 7], [8]])
    padded = supervised_batch(unpadded, SFTConfig(eos_padding="loss", pad_to="batch"), EOS, 99, Noise(0), 1)
    assert [row.tolist() for row in padded.completions] == [[5, 6, 7, EOS], [8, EOS, EOS, EOS]] and padded.scored_length.tolist() == [4, 4]
    assert supervised_batch(batch, SFTConfig(eos_padding="loss", pad_to="batch"), EOS, 6, Noise(0), 1).scored_length.tolist() == [4, 4]
    assert supervised_batch(unpadded, SFTConfig(eos_padding="loss"), EOS, 6, Noise(0), 1).scored_length.tolist() == [6, 6]
    full = replace(unpadded, completions=[row[:-1] for row in unpadded.completions], response_length=unpadded.response_length - 1)
    assert with_ending(full, "none", EOS, 6).scored_length.tolist() == [3, 1], "an answer that fills the canvas has no EOS to take away"
    with pytest.raises(DataError, match="empty answer"):
        with_ending(batch_of([[]]), "none", EOS, 4)


def test_masked_prompts_are_part_of_what_is_scored():
    batch = whole_sequences(batch_of([[5, 6], [7]], prompts=[[1, 2, 3], [4]], canvas=4))
    assert [row.tolist() for row in batch.completions] == [[1, 2, 3, 5, 6, EOS, EOS], [4, 7, EOS, EOS, EOS]]
    assert batch.scored_length.tolist() == [7, 5] and [len(prompt) for prompt in batch.prompts] == [0, 0]
    hidden = np.zeros(7, dtype=bool)
    for update in range(40):
        views = supervised.make(batch, None, supervised.Config(), Noise(0).stream("views"), update, PROFILE)
        hidden[views.score_token[views.score_sample == 0]] = True
        kept = supervised.make(batch_of([[5]]), None, supervised.Config(), Noise(0).stream("views"), update, PROFILE)
        assert (kept.tokens[:2] == torch.tensor([1, 2])).all(), "without the key prompts are never hidden"
    assert hidden.all()


def test_random_lengths_are_a_share_of_batches_and_uniform():
    batch = batch_of([[5] * 7, [6] * 3])
    assert cut_at_random(batch, 0.0, Noise(0), 1) is batch
    cuts = [cut_at_random(batch, 0.25, Noise(0), step).scored_length for step in range(4000)]
    share = np.mean([cut[0] < 8 for cut in cuts])
    assert abs(share - 0.25 * 7 / 8) < 4 * math.sqrt(0.22 * 0.78 / 4000)
    every = [cut_at_random(batch, 1.0, Noise(0), step).scored_length for step in range(4000)]
    counts = np.bincount([cut[0] for cut in every], minlength=9)[1:]
    assert (abs(counts - 500) < 5 * math.sqrt(500)).all()
    assert all(cut[1] == min(cut[0], 4) for cut in every), "one length for the whole batch"


# -------------------------------------------------------------------------------------------------------------- the loss


def test_the_default_is_bit_equal_to_the_elbo_per_token():
    batch = batch_of([[5, 6, 7, 8], [9], [10, 11]], canvas=6)
    for draws in (1, 3):
        ours = supervised.make(batch, None, supervised.Config(draws=draws), Noise(7).stream("views"), 2, PROFILE)
        theirs = elbo.make(batch, None, elbo.Config(draws=draws), Noise(7).stream("views"), 2, PROFILE)
        for name in ("tokens", "score_row", "score_position", "score_target", "score_weight", "sample", "draw"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    before = AlgorithmConfig(
        advantage={"name": "constant"},
        views={"name": "elbo", "draws": 1},
        likelihood={"name": "elbo"},
        objective={"name": "weighted_likelihood"},
        behavior="none",
    )
    values = []
    for config in (before, supervised_algorithm(SFTConfig(), "inverse_t")):
        algorithm = Algorithm.compose(config)
        credit = algorithm.credit(batch)
        views = algorithm.make_views(batch, credit, Noise(0), 0, PROFILE)
        log_prob = -torch.arange(1.0, len(views.score_row) + 1) / 7
        values.append(algorithm.coefficients(LogProbs(log_prob), views, batch, credit))
    assert torch.equal(values[0][0], values[1][0]) and values[0][2] == values[1][2]


def weight_of(config: SFTConfig, tokens: np.ndarray, prompt: int, canvas: np.ndarray, place: int, inverse: float) -> float:
    """The loss weight of one hidden token, from the row as the model sees it."""
    if config.loss_weight == "inverse_t":
        return inverse
    if config.loss_weight == "plain":
        return 1.0
    distances = [abs(prompt + place - other) for other, token in enumerate(tokens) if token != MASK]
    return sum(0.5 * P * (1 - P) ** (distance - 1) for distance in distances)


@pytest.mark.parametrize("masks", ["count", "time"])
@pytest.mark.parametrize("weight", ["inverse_t", "plain", "cart"])
@pytest.mark.parametrize("normalize", ["answer_length", "batch_tokens", "masked_tokens"])
def test_the_loss_by_its_formula(masks, weight, normalize):
    config = SFTConfig(draws=2, masks=masks, loss_weight=weight, normalize=normalize)
    batch = batch_of([[5, 6, 7, 8, 9], [10], [11, 12, 13]], prompts=[[1, 2, 3], [4], [1, 4]])
    loss, views, log_prob = loss_of(config, batch)
    offsets = views.layout.row_offsets.tolist()
    sums, hidden = np.zeros((3, 2)), np.zeros((3, 2))
    for number in range(views.num_rows):
        sample, draw = int(views.sample[number]), int(views.draw[number])
        tokens, prompt = views.tokens[offsets[number] : offsets[number + 1]].numpy(), len(batch.prompts[sample])
        scored = (views.score_row == number).numpy()
        places = views.score_token.numpy()[scored]
        assert (tokens[prompt:][places] == MASK).all() and (tokens == MASK).sum() == len(places)
        assert (views.score_target.numpy()[scored] == batch.completions[sample][places]).all()
        if masks == "count":
            inverse = len(tokens[prompt:]) / max(len(places), 1)
        else:
            level = Noise(0).stream("views").uniform(1, uid=sample, draw=draw, position=1)[0]
            inverse = 1 / (0.999 * level + 1e-3)
        weights = [weight_of(config, tokens, prompt, batch.completions[sample], place, inverse) for place in places]
        sums[sample, draw] = -(np.array(weights) * log_prob[scored]).sum() if len(places) else 0.0
        hidden[sample, draw] = len(places)
    per_sample, length = sums.mean(1), batch.scored_length
    expected = {
        "answer_length": np.mean(per_sample / length),
        "batch_tokens": per_sample.sum() / length.sum(),
        "masked_tokens": per_sample.sum() / hidden.mean(1).sum(),
    }[normalize]
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("masks", ["count", "time"])
@pytest.mark.parametrize("weight", ["inverse_t", "plain", "cart"])
def test_the_mean_over_masks_by_enumeration(masks, weight):
    """8,000 draws against the law of the masks: random log-probs for every mask of four tokens."""
    length, prompt, size = 4, 2, 8_000
    table = -np.random.default_rng(0).random((2**length, length)) * 3
    batch = batch_of([[5, 6, 7]], prompts=[[1, 2]])
    repeated = replace(
        batch,
        uid=np.arange(size, dtype=np.uint64),
        group=np.arange(size),
        prompts=batch.prompts * size,
        completions=batch.completions * size,
        response_length=np.repeat(batch.response_length, size),
        scored_length=np.repeat(batch.scored_length, size),
        rewards=np.ones((size, 1)),
        member=np.zeros(size, dtype=np.int64),
    )
    views = supervised.make(repeated, None, supervised.Config(masks=masks, loss_weight=weight), Noise(3).stream("views"), 0, PROFILE)
    row, token = views.score_row.numpy(), views.score_token.numpy()
    code = np.zeros(size, dtype=np.int64)
    np.add.at(code, row, 1 << token)
    value = np.zeros(size)
    np.add.at(value, row, views.score_weight.numpy() * table[code[row], token])

    def context(mask, place):
        visible = [*range(prompt), *(prompt + other for other in range(length) if not mask[other])]
        return sum(0.5 * P * (1 - P) ** (abs(prompt + place - other) - 1) for other in visible)

    expected = 0.0
    times = (np.arange(20_000) + 0.5) / 20_000 * 0.999 + 1e-3
    for mask in itertools.product((0, 1), repeat=length):
        count = sum(mask)
        if not count:
            continue
        sum_code = sum(bit << place for place, bit in enumerate(mask))
        density = times**count * (1 - times) ** (length - count)
        chance = {"count": 1 / length / math.comb(length, count), "time": density.mean()}[masks]
        inverse = {"count": chance * length / count, "time": (density / times).mean()}[masks]
        for place in np.flatnonzero(mask):
            share = {"inverse_t": inverse, "plain": chance, "cart": chance * context(mask, place)}[weight]
            expected += share * table[sum_code, place]
    assert abs(value.mean() - expected) < 4 * value.std() / math.sqrt(size)
    assert value.std() / math.sqrt(size) < 0.05 * abs(expected)


def test_mask_ranges_bound_the_share_that_is_hidden():
    batch = batch_of([[5] * 19] * 200)
    config = SFTConfig(mask_range=(0.3, 0.8), loss_weight="plain")
    _, views, _ = loss_of(config, batch)
    hidden = np.bincount(views.score_sample)
    assert hidden.min() == 7 and hidden.max() == 16, "1 + floor(u 20) for u in (0.3, 0.8)"
    assert supervised_algorithm(config, "plain").likelihood["name"] == "cross_entropy", "no ELBO"


def test_context_weights_by_hand():
    visible = np.array([True, False, False, True, False])
    got = supervised.context_weights(visible, 0.5)
    np.testing.assert_allclose(got[[1, 2, 4]], [0.25 + 0.125, 0.125 + 0.25, 0.25 + 0.03125])
    long = np.random.default_rng(0).random(700) < 0.5
    distance = abs(np.subtract.outer(np.arange(700), np.arange(700)))
    matrix = np.where(distance > 0, 0.5 * P * (1 - P) ** (np.maximum(distance, 1) - 1.0), 0)
    np.testing.assert_allclose(supervised.context_weights(long, P), matrix @ long, atol=1e-10)


def test_auto_is_the_familys_weight(tmp_path):
    for family, name, expected in ((llada, "llada", "inverse_t"), (dream, "dream", "cart")):
        fields = getattr(family, "TINY", {}) | {"mask_token_id": 1, "eos_token_id": 0}
        network = family.build(family.Config.from_published(fields)).initialize(torch.Generator().manual_seed(0))
        save_network(network, tmp_path / name)
        assert family_weight(tmp_path / name) == expected
    assert supervised_algorithm(SFTConfig(), "cart").views["loss_weight"] == "cart"
    assert supervised_algorithm(SFTConfig(loss_weight="plain"), "cart").views["loss_weight"] == "plain"


# -------------------------------------------------------------------------------------------------------------- steps


def hidden_of(batch: Batch) -> list[list[int]]:
    """Places that are hidden in each sample of a batch."""
    algorithm = Algorithm.compose(supervised_algorithm(SFTConfig(), "inverse_t"))
    views = algorithm.make_views(batch, algorithm.credit(batch), Noise(0), 0, PROFILE)
    return [views.score_token[views.score_sample == sample].tolist() for sample in range(len(batch))]


def demonstrations(tiny, tmp_path):
    """`batch(step)` of two demonstrations that are the only data, with the tokenizer."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "1 2", "completion": text}) + "\n" for text in ("3 4 5", "6")))
    overrides = ["task.name=jsonl", f"task.train={{path: {tmp_path}/rows.jsonl, completion: completion}}", "sampler.length=16"]
    recipe = tiny(*ALONE, *overrides, "sampler.block_length=4", "sft.batch_size=2")
    tokenizer = word_level([str(digit) for digit in range(10)])
    task = load_task("jsonl", recipe.task.train, "train", 0)
    return lambda step: demonstration_batch(task, tokenizer, recipe, step), tokenizer


def test_the_same_demonstration_is_hidden_otherwise_in_every_step(tiny, tmp_path):
    batch, _ = demonstrations(tiny, tmp_path)
    steps = [batch(step) for step in range(1, 21)]
    assert all(np.array_equal(sorted(map(tuple, one.completions)), sorted(map(tuple, steps[0].completions))) for one in steps)
    assert len({uid for one in steps for uid in one.uid.tolist()}) == 40, "no two share their noise"
    hidden = [tuple(row) for one in steps for row in hidden_of(one)]
    assert len(set(hidden)) > 30
    assert hidden_of(batch(7)) == hidden_of(steps[6]), "a resumed step is the same"


def test_the_same_document_is_hidden_otherwise_in_every_step():
    packed = PackedDocuments([np.arange(16, dtype=np.int32)], "direct", 16, eos_id=EOS, noise=Noise(0))
    hidden = [tuple(row) for step in range(1, 21) for row in hidden_of(packed.batch(step, 2))]
    assert len(set(hidden)) > 30


def test_the_same_chosen_response_is_hidden_otherwise_in_every_epoch():
    response = np.arange(16, dtype=np.int32)
    pairs = Pairs(np.arange(2), [response[:2]] * 2, [(response, response)] * 2, np.array([[1.0, 0.0]] * 2), MASK, EOS)
    hidden = [tuple(row) for epoch in range(20) for row in hidden_of(pairs.demonstrations().batch([0, 1], epoch))]
    assert len(set(hidden)) > 30


def test_the_first_eos_is_a_part_of_a_demonstration(tiny, tmp_path):
    batch, tokenizer = demonstrations(tiny, tmp_path)
    one = batch(1)
    eos = tokenizer.eos_token_id
    for length, completion in zip(one.response_length, one.completions, strict=True):
        assert completion.tolist().index(eos) == length - 1 and (completion[length - 1 :] == eos).all() and len(completion) == 16
    assert sorted(one.response_length.tolist()) == [2, 4] and one.scored_length.tolist() == [16, 16]
    assert sorted(with_ending(one, "first", eos, 16).scored_length.tolist()) == [2, 4], "so supervised training learns to end"


def test_a_demonstration_that_fills_the_canvas_has_no_eos(tiny):
    recipe = tiny(*ALONE, "algorithm.length=response")
    batch = demonstration_batch(load_task("sort", recipe.task.train, "train", 0), task_tokenizer("sort", {}), recipe, 1)
    assert batch.response_length.tolist() == batch.scored_length.tolist() == [4] * 8 and {len(one) for one in batch.completions} == {4}


# -------------------------------------------------------------------------------------------------------------- runs


def learned(tiny, tmp_path, *overrides: str) -> list[dict]:
    recipe = tiny(*ALONE, f"run.output_dir={tmp_path}", *overrides)
    return [row for row in read_metrics(train(recipe) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    "keys",
    [
        ("sft.eos_padding=first",),
        ("sft.eos_padding=loss", "sft.pad_to=batch", "sft.masks=time"),
        ("sft.loss_weight=cart", "sft.normalize=masked_tokens"),
        ("sft.mask_prompt=true", "sft.normalize=batch_tokens"),
        ("sft.random_length=0.5", "sft.mask_range=[0.3, 0.8]", "sft.loss_weight=plain"),
    ],
)
def test_recipes_train_with_each_key(tiny, tmp_path, keys):
    rows = learned(tiny, tmp_path, "sft.steps=12", "sft.eval_every=12", *keys)
    assert len(rows) == 12 and all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sft.eos_padding=frist", "did you mean first"),
        ("sft.loss_weight=kart", "did you mean cart"),
        ("sft.mask_range=[0.8, 0.3]", "ascend"),
        ("sft.random_length=2", r"must be in \[0, 1\]"),
    ],
)
def test_wrong_keys_are_told(tiny, key, message):
    with pytest.raises(RecipeError, match=message):
        tiny(key)
