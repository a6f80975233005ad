"""What is not finite is an error that names the tensor, and weights of few bits are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from rlhub.commands.main import main
from rlhub.config.schema import LearnerConfig, OptimizerConfig
from rlhub.training.run import train
from workers.backends.torch_backend import Backend

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(f"run.output_dir={tmp_path_factory.mktemp('runs')}", "run.phases=[sft]", "sft.steps=1", "sft.eval_every=1"), None)


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    """The run's model with one NaN in its last feed-forward layer."""
    (source,) = (run / "checkpoints").glob("*/hf")
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.blocks.1.ff_out.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "arguments", [[], ["--likelihood", "recipes/data/sort_choices.jsonl", "limit=2", "draws=1"]], ids=["eval", "likelihood"]
)
def test_a_model_with_nan_has_no_accuracy(run: Path, damaged: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    command = ["eval", str(damaged), *arguments] if arguments else ["eval", str(damaged), "--recipe", str(run / "config.yaml")]
    found = CliRunner().invoke(main, command)
    message = found.output + (found.stderr or "")
    assert found.exit_code == 2, message
    assert "log-probs of this model are not finite: 1 of " in message and "blocks.1" in message and "ff" in message


def moved_share(dtype: torch.dtype) -> float:
    """Share of the weights that eight updates of 3e-6 move, of the sum of what they have moved to."""
    network = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    network.to(dtype)
    before = network.weight.detach().float().clone()
    backend = Backend(network, OptimizerConfig(learning_rate=3e-6, warmup_steps=0, schedule="constant"), 8, LearnerConfig(backend="torch"))
    for step in range(8):
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        backend.backward(backend.forward(lambda network, inputs=inputs: network(inputs).float().square().mean()))
        backend.step()
    return (backend.masters[0].detach().float() != before).double().mean().item()


def test_weights_of_16_bits_are_trained_as_those_of_32_are() -> None:
    assert moved_share(torch.bfloat16) >= 0.99 * moved_share(torch.float32) > 0.9


def test_copies_in_float32_are_saved_and_loaded(tmp_path: Path) -> None:
    found = []
    for stop in (False, True):
        network = torch.nn.Linear(8, 8, bias=False).to(torch.bfloat16)
        with torch.no_grad():
            network.weight.copy_(torch.arange(64).view(8, 8) / 64)
        config = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, schedule="constant")
        backend = Backend(network, config, 4, LearnerConfig(backend="torch"))
        for step in range(4):
            if stop and step == 2:
                backend.save(tmp_path)
                backend = Backend(network, config, 4, LearnerConfig(backend="torch"))
                backend.load(tmp_path)
            backend.backward(network(torch.ones(1, 8, dtype=torch.bfloat16)).float().square().mean())
            backend.step()
        assert torch.equal(network.weight, backend.masters[0].to(torch.bfloat16))
        found.append(backend.masters[0].detach().clone())
    assert torch.equal(*found)
