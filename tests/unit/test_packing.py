"""Documents in packed rows: what is seen, that no token is lost, and training on them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhub.algorithm.scoring import token_log_probs
from rlhub.config.recipe import load_recipe
from rlhub.errors import DataError
from rlhub.models import dream, sdar
from rlhub.models.llada import Config, LLaDA
from rlhub.noise import Noise
from rlhub.phases import Phase
from rlhub.planning.plan import make_plan
from rlhub.planning.view import format_plan
from rlhub.records.metrics import read_metrics
from rlhub.tasks import load_task, task_tokenizer
from rlhub.training.documents import PackedDocuments, document_batch, pack_documents
from rlhub.training.run import train
from rlhub.views._rows import NoisyRow, build_views

EOS, MASK = 1, 0


@pytest.fixture(scope="module", params=["llada", "dream"])
def network(request):
    if request.param == "dream":
        config = dream.Config.from_published({**dream.TINY, "mask_token_id": MASK, "eos_token_id": EOS})
        return dream.build(config).initialize(torch.Generator().manual_seed(0)).eval()
    config = Config(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, vocab_size=24, init_std=0.3)
    return LLaDA(config).initialize(torch.Generator().manual_seed(0)).eval()


def documents(count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 24, size=generator.integers(1, 14)).astype(np.int32) for _ in range(count)]


def packed_of(docs, packing: str, length: int) -> PackedDocuments:
    return PackedDocuments(docs, packing, length, EOS, Noise(0))


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("packing", ["adaptive", "eod", "direct"])
@pytest.mark.parametrize("length", [1, 7, 16, 1000])
def test_an_epoch_holds_every_token_once(packing, length):
    docs = documents(20)
    packed = packed_of(docs, packing, length)
    for epoch in (0, 3):
        rows = [packed.row(epoch * packed.rows_per_epoch + place) for place in range(packed.rows_per_epoch)]
        assert all(len(tokens) == length for tokens, _ in rows[:-1]) and 1 <= len(rows[-1][0]) <= length
        stream = np.concatenate([tokens for tokens, _ in rows]).tolist()
        order = Noise(0).generator("data/documents/order", epoch=epoch).permutation(20)
        end = [EOS] if packing == "eod" else []
        assert stream == [token for index in order for token in docs[index].tolist() + end]
        assert all(document[0] == 0 and (np.diff(document) >= 0).all() for _, document in rows)


def test_epochs_are_shuffled_and_steps_go_on():
    packed = packed_of(documents(30), "direct", 8)
    assert packed.epoch(0)[0].tolist() != packed.epoch(1)[0].tolist()
    again = packed_of(documents(30), "direct", 8)
    for step in (9, 2, 40):
        ours, theirs = packed.batch(step, 4), again.batch(step, 4)
        assert all(np.array_equal(a, b) for a, b in zip(ours.completions, theirs.completions, strict=True))
        first = packed.row((step - 1) * 4)[0]
        assert np.array_equal(ours.completions[0], first) and ours.segments is None


def packed_log_probs(network, docs, packing: str, masks) -> np.ndarray:
    """Log-probs of the masked document tokens of one row that holds all documents, in their order."""
    end = [EOS] if packing == "eod" else []
    pieces = [np.append(doc, end).astype(np.int32) for doc in docs]
    segments = [np.repeat(np.arange(len(docs), dtype=np.int32), [len(piece) for piece in pieces])] if packing == "adaptive" else None
    batch = document_batch([np.concatenate(pieces)], Phase.SFT, 1, segments)
    masked = np.concatenate([np.append(mask, np.zeros(len(end), dtype=bool)) for mask in masks])
    return token_log_probs(network, build_views(batch, [NoisyRow(0, 0, masked)], 1, network.profile), 10_000).numpy()


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_packing_equals_the_documents_one_by_one(network, seed):
    docs = documents(6, seed)
    generator = np.random.default_rng(seed)
    masks = [np.append(True, generator.random(len(doc) - 1) < 0.5) for doc in docs]
    noisy = [NoisyRow(number, 0, mask) for number, mask in enumerate(masks)]
    alone = build_views(document_batch(docs, Phase.SFT, 1), noisy, 1, network.profile)
    expected = token_log_probs(network, alone, 10_000).numpy()
    np.testing.assert_allclose(packed_log_probs(network, docs, "adaptive", masks), expected, atol=1e-6)
    for packing in ("eod", "direct"):
        assert np.abs(packed_log_probs(network, docs, packing, masks) - expected).max() > 1e-3, packing


def test_block_causal_models_are_refused():
    batch = packed_of(documents(5), "adaptive", 8).batch(1, 2)
    profile = sdar.build(sdar.Config.from_published(sdar.TINY)).profile
    with pytest.raises(ValueError, match="packed documents need a model with full attention"):
        build_views(batch, [NoisyRow(0, 0, np.ones(8, dtype=bool))], 1, profile)


# -------------------------------------------------------------------------------------------------------------- data


def test_documents_from_every_source(tmp_path):
    (tmp_path / "folder").mkdir()
    texts = [f"document {number} " * (number + 1) for number in range(6)]
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text, "body": text[::-1]}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for path in ("folder/", "rows.jsonl", "rows.jsonl.gz"):
        task = load_task("documents", {"path": f"{tmp_path}/{path}", "held_out_one_in": 0}, "train", 0)
        assert sorted(task.example(index).demonstration for index in range(6)) == sorted(texts) and task.size == 6
    one = load_task("documents", {"path": str(tmp_path / "folder" / "3.txt"), "held_out_one_in": 0}, "train", 0)
    assert [one.example(index).demonstration for index in range(3)] == [texts[3]] * 3
    backwards = load_task("documents", {"path": str(tmp_path / "rows.jsonl"), "text": "body", "held_out_one_in": 0, "limit": 2}, "train", 0)
    assert backwards.size == 2 and backwards.example(0).demonstration[::-1] in texts


def test_held_out_documents_are_not_trained_on(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(200)))
    sides = [load_task("documents", {"path": str(tmp_path / "rows.jsonl"), "held_out_one_in": 5}, split, 0) for split in ("train", "test")]
    texts = [{task.example(index).demonstration for index in range(task.size)} for task in sides]
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 200 and 20 < len(texts[1]) < 65


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"words": "a"}\n', {}, r"row 1: no text in field 'text'; the row has: words"),
        ('{"text": "  "}\n', {"held_out_one_in": 0}, "no documents to train on"),
        ("{}", {"path": "missing.txt"}, "not found: missing.txt"),
        ("{}", {"path": "missing/"}, "no folder with .txt or .md files"),
        ("{}", {"path": ""}, "path is missing"),
        ("{}", {"vocabulary": 100}, "at least 256"),
    ],
)
def test_bad_documents_are_told(tmp_path, content, options, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_task("documents", {"path": str(tmp_path / "rows.jsonl"), **options}, "train", 0)


def test_a_document_with_the_mask_token_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("good words and [MASK] words")
    options = {"path": str(tmp_path / "text.txt"), "held_out_one_in": 0, "vocabulary": 256}
    tokenizer = task_tokenizer("documents", options)
    with pytest.raises(DataError, match=r"document 0 holds the mask token \[MASK\]"):
        pack_documents(load_task("documents", options, "train", 0), tokenizer, "adaptive", 8, Noise(0))


# -------------------------------------------------------------------------------------------------------------- training

RECIPE = Path(__file__).parents[2] / "recipes" / "long_context.yaml"


@pytest.fixture
def corpus(tmp_path) -> str:
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    texts = [" ".join(generator.choice(words, size=generator.integers(3, 40))) for _ in range(120)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("packing", ["adaptive", "eod", "direct"])
def test_training_on_documents_raises_their_elbo(corpus, tmp_path, packing):
    keys = ["run.name=packed", f"run.output_dir={tmp_path}", f"task.train.path={corpus}", f"sft.packing={packing}", "task.eval_rows=16"]
    keys += [
        "task.train.held_out_one_in=5",
        "sft.steps=20",
        "sft.eval_every=20",
        "sft.batch_size=4",
        "sampler={length: 48, steps: 48, block_length: 48}",
    ]
    recipe = load_recipe(RECIPE, keys)
    rows = read_metrics(train(recipe) / "metrics.jsonl")
    assert rows[-1]["eval/elbo_per_token"] > rows[0]["eval/elbo_per_token"] + 0.5 and rows[-1]["eval/num_documents"] > 5
    plan = format_plan(make_plan(recipe))
    assert f"packed {packing} into rows" in plan and "48" in plan
