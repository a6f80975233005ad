"""What vLLM needs to denoise canvases: a plugin for its native path for diffusion language models.

    model         a network of `rlhub.models` under vLLM's attention and paged keys and values
    state         canvases as vLLM schedules them: who attends to whom, and the sampler that hands hidden states to a run
    cpu_kernels   stand-ins for the Triton kernels of vLLM's model runner on machines without a GPU

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). `rlhub.engines.vllm_engine` drives it: the
network is its own object, which vLLM's worker in the same process takes over with its weights, so that whatever updates the network
updates the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhub.errors import UserError
from rlhub.vllm_environment import check_vllm

if TYPE_CHECKING:
    from torch import nn


def check_model(network: nn.Module) -> None:
    """Raises UserError for networks that the engine does not serve."""
    if not hasattr(network, "hidden_states") or network.profile.time_conditioned:
        raise UserError(f"roles.engine: vllm does not serve {type(network).__name__}; use roles.engine: torch")


def register() -> None:
    """Make the model known to vLLM; may be called again."""
    check_vllm()
    from rlhub.engines.vllm_plugin import model

    model.register()
