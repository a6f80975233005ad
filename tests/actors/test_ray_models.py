"""Adapters and mixtures of experts through Ray actors and DeepSpeed learners: equal to the run in one process, resumed, exported."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
from helpers import distance, rows
from rich.console import Console
from safetensors.torch import load_file

from rlhub.checkpoints.export import export
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import Recipe
from rlhub.errors import UserError
from rlhub.evals.checkpoint import evaluate_checkpoint
from rlhub.networks.layout import pack_layout
from rlhub.networks.lora import training_state
from rlhub.parts import load_part
from rlhub.records.metrics import read_metrics
from rlhub.records.rollout_log import read_rollouts, rollout_path
from rlhub.tasks import task_tokenizer
from rlhub.training.run import train

pytestmark = pytest.mark.usefixtures("quick_report")

TEAM = ("run.runtime=ray", "learner.backend=deepspeed", "roles.generators=2", "roles.learners=2")
SHORT = ("run.phases=[online]", "run.steps=3", "run.checkpoint_every=1", "run.eval_every=3", "roles.scorers=0")
LAST = "step_00003"
ADAPTED = (*SHORT, "algorithm.reference=adapter_off", "learner.optimizer.learning_rate=0.01")
FRESH = (*ADAPTED, "model.lora.rank=2")
REPLAYED = (
    *SHORT,
    "algorithm.reference=none",
    "algorithm.kl.coefficient=0",
    "algorithm.fresh_views=step",
    "model.router={replay: true, load_balance: 0.1}",
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`run(*overrides)`: the folder of a finished run."""

    def finished(*overrides: object) -> Path:
        return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('runs')}", *overrides), Console(file=io.StringIO()))

    return finished


def base(folder: Path, family: str) -> torch.nn.Module:
    """A small model of a family that can work on the task, its selection biases far from equal where it has some."""
    module, tokenizer = load_part("models", family), task_tokenizer("sort", {})
    vocabulary = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    network = module.build(module.Config.from_published(module.TINY | vocabulary | ends)).initialize(torch.Generator().manual_seed(3))
    for _, buffer in network.named_buffers():
        buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    save_network(network, folder, tokenizer)
    return network


def weights(run: Path, folder: str = f"checkpoints/{LAST}/hf") -> dict[str, torch.Tensor]:
    (file,) = (run / folder).glob("*.safetensors")
    return load_file(file)


def tokens(run: Path, step: int) -> list[dict]:
    return [{key: value for key, value in sample.items() if key != "logp"} for sample in read_rollouts(rollout_path(run, step))]


def same_within_tolerance(ours: Path, theirs: Path, start: dict[str, torch.Tensor]) -> None:
    """The same tokens, and metrics and weights as far as rounding goes."""
    for step in range(1, 4):
        assert tokens(ours, step) == tokens(theirs, step)
    assert distance(weights(ours), weights(theirs)) <= 1e-3 * distance(weights(theirs), start) != 0
    for one, other in zip(rows(ours), rows(theirs), strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), key


def synced_bytes(run: Path) -> int:
    """Of every update, all of which were received as they were sent."""
    online = read_metrics(run / "metrics.jsonl")[1:]
    assert all(row["sync/receipt_ok"] == 1.0 for row in online)
    (size,) = {row["system/sync_bytes"] for row in online}
    return size


def state_bytes(folder: Path) -> int:
    network = load_network(folder, merge_adapter=False)
    return sum(tensor.numel() * tensor.element_size() for tensor in training_state(network).values())


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.head(network.denoise(torch.arange(8), pack_layout([8])), torch.arange(8))


# ---------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def local_run(run: Callable[..., Path]) -> Path:
    return run(*FRESH)


@pytest.fixture(scope="module")
def ray_run(run: Callable[..., Path]) -> Path:
    return run(*FRESH, *TEAM)


def adapters_only(run: Path, whole: Path) -> None:
    """What travelled and what was kept is the adapter."""
    hf = run / "checkpoints" / LAST / "hf"
    assert synced_bytes(run) == state_bytes(hf) < 0.2 * state_bytes(whole)
    assert [file.name for file in hf.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_adapters_at_zero_1_equal_the_run_in_one_process(ray_run: Path, local_run: Path) -> None:
    same_within_tolerance(ray_run, local_run, weights(local_run, "first_adapter"))
    adapters_only(ray_run, ray_run / "first_model")
    assert weights(ray_run, "first_model").keys() == weights(local_run, "first_model").keys()
    assert distance(weights(ray_run, "first_model"), weights(local_run, "first_model")) == 0.0
    assert all(row["kl"] > 1e-6 for row in rows(ray_run)[2:]), "the base is the reference, and the policy leaves it"


@pytest.mark.slow
def test_adapters_at_zero_3_by_broadcast(run: Callable[..., Path], local_run: Path) -> None:
    ours = run(*FRESH, *TEAM, "learner.zero_stage=3", "weights.transport=gloo")
    same_within_tolerance(ours, local_run, weights(local_run, "first_adapter"))
    adapters_only(ours, ours / "first_model")


@pytest.mark.slow
def test_a_run_whose_learner_was_killed_continues_bit_for_bit(ray_run: Path, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = tmp_path / "tiny"

    def kill() -> None:
        while not (run / "checkpoints" / "step_00001" / "manifest.json").exists():
            time.sleep(0.01)
        process = re.findall(r"starts as process (\d+)", (run / "logs" / "learner-1.log").read_text())[-1]
        os.kill(int(process), signal.SIGKILL)

    recipe = tiny(f"run.output_dir={tmp_path}", *FRESH, *TEAM)
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match=r"learner-1 died.*the same command continues"):
        train(recipe, Console(file=io.StringIO()))
    assert not (run / "checkpoints" / LAST).exists()
    train(recipe, Console(file=io.StringIO()))
    assert rows(run) == rows(ray_run)
    assert distance(weights(run), weights(ray_run)) == 0.0


def test_export_merges_and_eval_and_peft_agree(ray_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    last = rows(ray_run)[-1]
    assert evaluate_checkpoint(ray_run) == {key: value for key, value in last.items() if key.startswith("eval/")}
    beside = logits(load_network(ray_run / "checkpoints" / LAST / "hf", merge_adapter=False))
    merged = export(ray_run, tmp_path / "merged")
    torch.testing.assert_close(logits(load_network(merged, merge_adapter=False)), beside, atol=1e-5, rtol=0)
    only = export(ray_run, tmp_path / "only", adapter_only=True)
    theirs = PeftModel.from_pretrained(load_network(ray_run / "first_model"), only)
    assert torch.equal(logits(theirs.base_model.model), beside)
    assert not torch.equal(beside, logits(load_network(ray_run / "first_model")))


@pytest.mark.slow
def test_an_adapter_of_peft_for_a_mixture_is_trained_further_at_zero_2(run: Callable[..., Path], tmp_path: Path) -> None:
    """On the attention alone, as the family's profile has it."""
    from peft import LoraConfig, get_peft_model

    network = base(tmp_path / "base", "llada_moe")
    adapted = get_peft_model(network, LoraConfig(r=3, lora_alpha=5, target_modules=network.profile.lora_targets))
    for number, parameter in enumerate(parameter for parameter in adapted.parameters() if parameter.requires_grad):
        torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(number))
    adapted.save_pretrained(tmp_path / "adapter")
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(re.search(r"self_attn\.[qkvo]_proj", name) for name in start)

    which = (*ADAPTED, f"model.path={tmp_path / 'base'}", f"model.adapter={tmp_path / 'adapter'}")
    theirs, ours = run(*which), run(*which, *TEAM, "learner.zero_stage=2", "weights.transport=gloo")
    assert weights(ours).keys() == start.keys()
    same_within_tolerance(ours, theirs, start)
    adapters_only(ours, tmp_path / "base")
    assert "router/level_1/load_shift" in rows(ours)[-1]


# ---------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.slow
def test_a_mixture_with_replayed_routes_at_zero_3_is_the_same_and_continues(
    run: Callable[..., Path], tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    start = base(tmp_path / "base", "llada2").state_dict()
    which = (*REPLAYED, f"model.path={tmp_path / 'base'}")
    theirs, ours = run(*which), run(*which, *TEAM, "learner.zero_stage=3")
    same_within_tolerance(ours, theirs, weights(tmp_path, "base"))
    assert synced_bytes(ours) == state_bytes(tmp_path / "base")
    levels = {key for row in rows(ours)[1:] for key in row if key.startswith("router/level_")}
    assert len(levels) >= 6 and all(row["router/load_balance"] >= 1 - 1e-3 for row in rows(ours)[1:])
    # A generator's receipt covers the buffers, which are equal to these.
    kept = load_network(ours / "checkpoints" / LAST / "hf").state_dict()
    biases = [name for name in kept if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(start[name].any() and torch.equal(kept[name], start[name]) for name in biases)

    killed = Path(shutil.copytree(ours, tmp_path / "again" / "tiny"))
    shutil.rmtree(killed / "checkpoints" / LAST)
    train(tiny(f"run.output_dir={tmp_path / 'again'}", *which, *TEAM, "learner.zero_stage=3"), Console(file=io.StringIO()))
    assert rows(killed) == rows(ours) and distance(weights(killed), weights(ours)) == 0.0


@pytest.mark.slow
def test_frozen_routers_stay_and_all_else_learns_at_zero_2(run: Callable[..., Path], tmp_path: Path) -> None:
    base(tmp_path / "base", "llada2")
    which = (*REPLAYED, f"model.path={tmp_path / 'base'}", "model.router.freeze=true")
    theirs, ours = run(*which), run(*which, *TEAM, "learner.zero_stage=2", "weights.transport=gloo")
    start, after = weights(tmp_path, "base"), weights(ours)
    same_within_tolerance(ours, theirs, start)
    assert synced_bytes(ours) == state_bytes(tmp_path / "base")
    routing = [name for name in start if re.search(r"\.gate\.(weight|expert_bias)$", name)]
    assert len(routing) == 4 and all(torch.equal(after[name], start[name]) for name in routing)
    assert not [name for name in start if name not in routing and torch.equal(after[name], start[name])]
