"""DeepSpeed ZeRO over the learners' process group.

The gradient-accumulation boundary is ours (`managed_gradient_accumulation: false`): any number of backward calls, then one step.
DeepSpeed averages gradients over ranks, so callers scale their part of a global sum by the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlhub.config.schema import LearnerConfig, OptimizerConfig
from rlhub.networks.decoder import Decoder
from rlhub.networks.lora import has_adapters, training_parameters
from workers.backends.torch_backend import adamw


class Backend:
    """See `workers.backends`. The default process group must exist."""

    def __init__(self, network: Decoder, config: OptimizerConfig, total_steps: int, learner: LearnerConfig) -> None:
        deepspeed = import_deepspeed()
        self.stage = learner.zero_stage
        parameter = next(network.parameters())
        optimizer, scheduler = adamw([one for one in network.parameters() if one.requires_grad], config, total_steps)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.max_grad_norm,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": self.stage},
            "bf16": {"enabled": parameter.dtype == torch.bfloat16},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        self.network = network
        self.engine, _, _, _ = deepspeed.initialize(model=_Callable(network), optimizer=optimizer, lr_scheduler=scheduler, config=settings)

    def forward(self, function: Callable[[Decoder], Tensor]) -> Tensor:
        return cast(Tensor, self.engine(function))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, float]:
        learning_rate = self.engine.get_lr()[0]
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm), learning_rate

    def full_parameters(self, trained_only: bool = False) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        wanted = training_parameters(self.network) if trained_only else self.network.parameters()
        return cast(AbstractContextManager[None], import_deepspeed().zero.GatheredParameters(list(wanted)))

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=has_adapters(self.network))

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=not has_adapters(self.network))
        if path is None:
            raise FileNotFoundError(f"no DeepSpeed state in {folder}")


class _Callable(torch.nn.Module):
    """Lets a function use the network inside a forward call of the engine, which prepares gathering and accumulation there."""

    def __init__(self, network: Decoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[Decoder], Tensor]) -> Tensor:
        return function(self.network)


def import_deepspeed() -> Any:
    """DeepSpeed without its compiled shared-memory collective, which would need a C++ compiler and serves inference only."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
