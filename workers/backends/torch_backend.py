"""Plain torch on one process: AdamW, clipping and a learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from rlhub.algorithm.schedule import learning_rate_factor
from rlhub.config.schema import LearnerConfig, OptimizerConfig
from rlhub.networks.decoder import Decoder
from rlhub.networks.lora import has_adapters, training_state


class Backend:
    """See `workers.backends`."""

    def __init__(self, network: Decoder, config: OptimizerConfig, total_steps: int, learner: LearnerConfig) -> None:
        self.network, self.config = network, config
        self.optimizer, self.scheduler = adamw(network, config, total_steps)

    def forward(self, function: Callable[[Decoder], Tensor]) -> Tensor:
        return function(self.network)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # of torch

    def step(self) -> tuple[float, float]:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), float(learning_rate)

    def full_parameters(self, trained_only: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        state = {
            "network": training_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        torch.save(state, folder / "learner.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "learner.pt", weights_only=True, map_location="cpu")
        self.network.load_state_dict(state["network"], strict=not has_adapters(self.network))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def adamw(network: Decoder, config: OptimizerConfig, total_steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule over `total_steps` optimizer steps."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, config))
    return optimizer, scheduler
