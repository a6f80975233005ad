"""The throughput benchmark of preference steps, at a tiny size: both sides compute the same loss and gradient."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

TINY = [
    "--pairs=3",
    "--draws=3",
    "--shortest=3",
    "--longest=12",
    "--d-model=32",
    "--layers=2",
    "--heads=2",
    "--vocabulary=40",
    "--repeats=1",
]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("preference")


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 50])  # the graph of the first pass is kept, or its rows are computed again
def test_prints_one_object_with_equal_gradients(benchmark, capsys, monkeypatch, micro_batch_tokens):
    monkeypatch.setattr(benchmark, "RATIO_LIMIT", 0.0)
    assert benchmark.main(["--json", f"--micro-batch-tokens={micro_batch_tokens}", *TINY]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["cosine"] >= 0.9999
    assert figures["loss_relative_difference"] < 1e-5
    assert figures["ratio_cached"] > figures["ratio"] > 0


def test_a_ratio_below_the_limit_is_a_failure(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "RATIO_LIMIT", 1e9)
    assert benchmark.main(["--json", *TINY]) == 1


def test_a_gradient_that_differs_is_a_failure(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "RATIO_LIMIT", 0.0)
    exact = benchmark.PlainDPO.backward

    def only_one_draw(plain, policy, reference):
        chosen, rejected = plain.draws
        return exact(benchmark.PlainDPO((chosen[:1], rejected[:1]), plain.response_length, plain.beta, plain.sft_weight), policy, reference)

    monkeypatch.setattr(benchmark.PlainDPO, "backward", only_one_draw)
    assert benchmark.main(["--json", *TINY]) == 1
