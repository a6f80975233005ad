"""Plain torch on one process: AdamW, clipping and a learning-rate schedule.

Weights of fewer than 32 bits are trained as copies in float32 (mixed precision, arXiv 1710.03740): at the learning rates of RL most
updates of a bfloat16 weight are smaller than half its last bit, and would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhub.algorithm.schedule import learning_rate_factor
from rlhub.config.schema import LearnerConfig, OptimizerConfig
from rlhub.networks.decoder import Decoder
from rlhub.networks.lora import has_adapters, training_state


class Backend:
    """See `workers.backends`."""

    def __init__(self, network: Decoder, config: OptimizerConfig, total_steps: int, learner: LearnerConfig) -> None:
        self.network, self.config = network, config
        self.trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        whole = all(parameter.dtype == torch.float32 for parameter in self.trained)
        self.masters = self.trained if whole else [nn.Parameter(parameter.detach().float()) for parameter in self.trained]
        self.optimizer, self.scheduler = adamw(self.masters, config, total_steps)

    def forward(self, function: Callable[[Decoder], Tensor]) -> Tensor:
        return function(self.network)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # of torch

    def step(self) -> tuple[float, float]:
        is_mixed = self.masters is not self.trained
        if is_mixed:
            for master, parameter in zip(self.masters, self.trained, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if is_mixed:
            self._round_masters()
        return norm.item(), float(learning_rate)

    @torch.no_grad()
    def _round_masters(self) -> None:
        for master, parameter in zip(self.masters, self.trained, strict=True):
            parameter.copy_(master)
            parameter.grad = None

    def full_parameters(self, trained_only: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        state: dict[str, object] = {
            "network": training_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.masters is not self.trained:
            state["masters"] = [master.detach() for master in self.masters]
        torch.save(state, folder / "learner.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "learner.pt", weights_only=True, map_location="cpu")
        self.network.load_state_dict(state["network"], strict=not has_adapters(self.network))
        if self.masters is not self.trained:
            with torch.no_grad():
                for master, kept in zip(self.masters, state["masters"], strict=True):
                    master.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def adamw(
    parameters: Sequence[Tensor], config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule over `total_steps` optimizer steps."""
    optimizer = torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, config))
    return optimizer, scheduler
