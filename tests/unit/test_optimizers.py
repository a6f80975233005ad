"""Both backends against AdamW written out here: the schedule, its length, weight decay, moments and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from rlhub.algorithm.schedule import learning_rate_factor
from rlhub.config.schema import LearnerConfig, OptimizerConfig
from workers.backends import deepspeed_backend, torch_backend

STEPS = 6
EPSILON = 1e-8  # torch's
EXPECTED = {  # of ten steps, the first three of them warm-up: w/4, 2/4, 3/4, then seven from 1 to the floor
    "constant": [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, *(1 - 0.8 * part / 7 for part in range(7))],
    "polynomial": [0.25, 0.5, 0.75, *(0.2 + 0.8 * ((7 - part) / 7) ** 3 for part in range(7))],
    "cosine": [0.25, 0.5, 0.75, *(0.2 + 0.4 * (1 + math.cos(math.pi * part / 7)) for part in range(7))],
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_schedules_by_hand(name: str) -> None:
    config = OptimizerConfig(schedule=name, warmup_steps=3, final_fraction=0.2, power=3.0)
    assert [learning_rate_factor(step, 10, config) for step in range(10)] == pytest.approx(EXPECTED[name])
    end = 1.0 if name == "constant" else 0.2
    assert [learning_rate_factor(step, 10, config) for step in (10, 11, 99)] == pytest.approx([end] * 3), "the floor stays"


@pytest.mark.parametrize(
    ("total", "expected"),
    [(1, [1.0]), (2, [0.5, 1.0]), (3, [1 / 3, 2 / 3, 1.0]), (0, [1.0])],
)
def test_a_warm_up_longer_than_the_run_leaves_its_last_step(total: int, expected: list[float]) -> None:
    config = OptimizerConfig(schedule="linear", warmup_steps=50, final_fraction=0.0)
    assert [learning_rate_factor(step, total, config) for step in range(max(total, 1))] == pytest.approx(expected)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match=r"constant, linear, cosine or polynomial, got 'step'"):
        learning_rate_factor(9, 10, OptimizerConfig(schedule="step"))


# ----------------------------------------------------------------------------------------------------------------- the updates


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one; DeepSpeed keeps the first that it meets, so all of its tests share this."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture(params=[torch_backend, deepspeed_backend], ids=["torch", "deepspeed"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if request.param is deepspeed_backend:
        request.getfixturevalue("group")
    return request.param


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.25]))
        self.fixed = torch.nn.Parameter(torch.ones(1), requires_grad=False)


def gradient(step: int) -> torch.Tensor:
    """float64 [4], of other size and direction at each step."""
    return torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).roll(step) * (0.3, 2.0, 1.0, 0.05, 4.0, 0.7)[step]


def trained(backend: ModuleType, config: OptimizerConfig, total: int) -> tuple[torch.Tensor, list[float], list[float]]:
    """The weights after six steps, each of two backward calls, with the norms and learning rates that were told."""
    network = Weights()
    made = backend.Backend(network, config, total, LearnerConfig())
    norms, rates = [], []
    for step in range(STEPS):
        for share in (0.25, 0.75):
            loss = made.forward(lambda module, step=step, share=share: (module.weight * gradient(step).float()).sum() * share)
            made.backward(loss)
        norm, rate = made.step()
        norms.append(norm)
        rates.append(rate)
    assert network.fixed.item() == 1.0
    return network.weight.detach().double(), norms, rates


def written_out(config: OptimizerConfig, factors: list[float]) -> torch.Tensor:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, Alg. 2) in float64, each gradient scaled down to the largest norm first."""
    weight, first, second = Weights().weight.detach().double(), torch.zeros(4).double(), torch.zeros(4).double()
    (one, two), rate = config.betas, config.learning_rate
    for step in range(STEPS):
        slope = gradient(step)
        slope = slope * min(1.0, config.max_grad_norm / slope.norm().item())
        first, second = one * first + (1 - one) * slope, two * second + (1 - two) * slope**2
        mean, square = first / (1 - one ** (step + 1)), second / (1 - two ** (step + 1))
        weight = weight * (1 - rate * factors[step] * config.weight_decay)
        weight = weight - rate * factors[step] * mean / (square.sqrt() + EPSILON)
    return weight


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight_decay": 0.3},
        {"betas": (0.5, 0.8)},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": 50.0},
        {"learning_rate": 0.2, "schedule": "polynomial", "power": 3.0, "final_fraction": 0.2, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_updates_are_those_of_the_formula(backend: ModuleType, fields: dict) -> None:
    config = OptimizerConfig(**{"learning_rate": 0.05, "schedule": "linear", "warmup_steps": 3, "final_fraction": 0.2} | fields)
    factors = EXPECTED[config.schedule][:STEPS]
    weight, norms, rates = trained(backend, config, total=10)
    torch.testing.assert_close(weight, written_out(config, factors), rtol=1e-5, atol=1e-6)
    assert rates == pytest.approx([config.learning_rate * factor for factor in factors])
    assert norms == pytest.approx([gradient(step).norm().item() for step in range(STEPS)], rel=1e-5), "before they are cut"
