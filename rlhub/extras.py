"""The packages that only some commands need, and the extra of rlhub that brings each: `pip install 'rlhub[judge]'`."""

from __future__ import annotations

from importlib.util import find_spec

from rlhub.errors import UserError

EXTRAS = {  # module: extra
    "accelerate": "lora",
    "aiohttp": "serve",
    "datasets": "data",
    "deepspeed": "train",
    "openai": "judge",
    "peft": "lora",
    "ray": "train",
    "sklearn": "digits",
    "tensorboard": "tensorboard",
}


def require(*modules: str) -> None:
    """Checks that modules can be imported, without importing them.

    Raises:
        UserError: one is not installed; the message names the extra that brings it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise UserError(not_installed(module))


def not_installed(module: str) -> str:
    """What to do about a module of `EXTRAS` that is not there.

    >>> not_installed("openai")
    "openai is not installed; pip install 'rlhub[judge]' brings it, 'rlhub[all]' everything"
    """
    return f"{module} is not installed; pip install 'rlhub[{EXTRAS[module]}]' brings it, 'rlhub[all]' everything"
