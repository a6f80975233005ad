"""Reward models and judges on vLLM: the values of transformers, legal verdicts only, and bad input that loses nothing."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, PreTrainedTokenizerFast

from rewards import judge, process_reward, reward_model

pytestmark = pytest.mark.vllm

SPECIAL = ["[PAD]", "[UNK]", "<s>", "<user>", "<assistant>", "<end>"]
LABELS = ["yes", "no", "maybe"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_TOKENS = 512
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# An empty completion, broken encoding, and too many tokens.
POISON = {"empty": ("ab", " \n"), "surrogate": ("ab", "c \ud800 d"), "too long": ("ab " * MAX_TOKENS, "cd")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a random Llama with a head of `labels` outputs for the whole text or each token, or with its language head."""

    def make(build: type, labels: int = 1) -> str:
        folder = str(tmp_path_factory.mktemp("checkpoint"))
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(LABELS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "<end>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=SPECIAL[3:5], **special)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, initializer_range=0.2)
        shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, num_labels=labels)
        build(LlamaConfig(**shape, pad_token_id=0, bos_token_id=2, eos_token_id=5)).save_pretrained(folder)
        return folder

    return make


def items(count: int, separator: str = " ") -> list[tuple[str, str, dict]]:
    random = np.random.default_rng(5)

    def text() -> str:
        return separator.join("".join(random.choice(list(LETTERS), random.integers(1, 7))) for _ in range(random.integers(1, 7)))

    return [(text(), text(), {}) for _ in range(count)]


@pytest.mark.parametrize(
    ("module", "build", "options", "separator"),
    [
        (reward_model, LlamaForSequenceClassification, {}, " "),
        (process_reward, LlamaForTokenClassification, {"reduce": "mean"}, "\n\n"),
    ],
    ids=["reward model", "process reward"],
)
def test_values_are_those_of_transformers_and_poison_loses_nothing(checkpoint, module, build, options, separator) -> None:
    folder, given = checkpoint(build), items(200, separator)
    given[20], given[77], given[150] = ((*texts, {}) for texts in POISON.values())
    results = {name: module.grade_batch(given, module.Config(model=folder, backend=name, **options)) for name in ("transformers", "vllm")}
    assert [result.status for result in results["vllm"]] == [result.status for result in results["transformers"]]
    assert {index for index, result in enumerate(results["vllm"]) if result.status == "rejected"} == {20, 77, 150}
    found, expected = ([result.value for result in results[name] if result.valid] for name in ("vllm", "transformers"))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[str]:
    """A vLLM server of a random language model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = checkpoint(LlamaForCausalLM)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "judge"]
    command += f"--port {port} --host 127.0.0.1 --enforce-eager --dtype float32 --kv-cache-memory-bytes {1 << 26}".split()
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, "the server does not start"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_judge_returns_legal_labels_only_and_poison_loses_nothing(server: str) -> None:
    """A random model would say anything; 200 requests, three of them bad."""
    import asyncio

    choices = {label: float(index) for index, label in enumerate(LABELS)}
    options = {"constrain": True, "attempts": 1, "timeout_seconds": 200, "template": "{prompt} {completion}?"}
    config = judge.Config(url=server, model="judge", choices=choices, **options)
    given = items(200)
    given[20], given[77], given[150] = ((*texts, {}) for texts in POISON.values())
    results = asyncio.run(judge.grade_batch(given, config))
    bad = {index: result for index, result in enumerate(results) if result.status != "ok"}
    assert len(bad) < 200, bad[0]
    assert bad.keys() == {20, 77, 150} and bad[20].status == bad[77].status == "rejected" and bad[150].status == "crashed"
    good = [result for result in results if result.valid]
    assert all(result.detail in LABELS and result.value == choices[result.detail] for result in good)
    assert len({result.detail for result in good}) > 1
    assert all(math.isnan(result.value) for result in bad.values())
