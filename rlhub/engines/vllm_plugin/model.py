"""A network of `rlhub.models` as a vLLM model.

The layers are the network's own, so every family of the common decoder is served, with adapters, and the weights are the tensors that
the rest of rlhub updates and hashes. Denoising runs tens of tokens of each request at once and is bound by its matrix products, for which
vLLM's fused layers call the same kernels; what vLLM adds is attention over paged keys and values and the scheduling around it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry
from vllm.config.vllm import VllmConfig
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import AttentionType

from rlhub.engines.vllm_plugin.cpu_kernels import install
from rlhub.engines.vllm_plugin.state import DenoisingState, Driver

ARCHITECTURE = "RLHubDenoiser"
LOAD_FORMAT = "rlhub"
MODEL_TYPE = "rlhub_denoiser"


class DenoiserConfig(PretrainedConfig):
    """The sizes that vLLM asks a model for; `canvas_length` marks a diffusion model."""

    model_type = MODEL_TYPE


def write_config(driver: Driver, max_length: int, folder: Path) -> None:
    """Write a config.json for the network.

    Args:
        max_length: tokens of the longest prompt with its canvas.
    """
    shape = driver.network.shape
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": driver.stop_id + 1,
        "max_position_embeddings": max_length,
        "canvas_length": driver.width,
    }
    (folder / "config.json").write_text(json.dumps(config))


_handed_over: list[Driver] = []


@contextmanager
def handing_over(driver: Driver) -> Iterator[None]:
    """The model that vLLM makes within takes the driver's network."""
    _handed_over.append(driver)
    try:
        yield
    finally:
        _handed_over.pop()


class Denoiser(nn.Module):
    """See the module docstring."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        install()
        self.driver = _handed_over[-1]
        shape = self.driver.network.shape
        encoder = self.driver.layout == "full"
        self.attentions = nn.ModuleList(
            (EncoderOnlyAttention if encoder else Attention)(
                shape.num_heads,
                shape.head_dim,
                shape.head_dim**-0.5,
                num_kv_heads=shape.num_kv_heads,
                cache_config=vllm_config.cache_config,
                attn_type=AttentionType.ENCODER_ONLY if encoder else AttentionType.DECODER,
                prefix=f"layers.{layer}.attn",
            )
            for layer in range(shape.num_layers)
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError  # vLLM wants the name of a text model; only multi-modal ones are asked

    def forward(self, input_ids: Tensor, positions: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Hidden states [T, D] of the packed tokens."""

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attentions[layer](query.flatten(1), key.flatten(1), value.flatten(1))

        return self.driver.network.hidden_states(input_ids, positions, attend)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves: the sampler takes logits of masked positions only, a slice at a time."""
        return hidden

    @staticmethod
    def get_model_state_cls() -> type:
        return DenoisingState


class HandedOver(BaseModelLoader):
    """Loads nothing: the network comes with its weights."""

    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        pass


def register() -> None:
    """Register config, model and loader; may be called again."""
    if ARCHITECTURE in ModelRegistry.models:
        return
    AutoConfig.register(MODEL_TYPE, DenoiserConfig)
    ModelRegistry.register_model(ARCHITECTURE, Denoiser)
    register_model_loader(LOAD_FORMAT)(HandedOver)
    if current_platform.is_cpu() and not HAS_TRITON:
        _allow_model_runner_without_triton()


def _allow_model_runner_without_triton() -> None:
    """Diffusion models need vLLM's second model runner, which 0.32 refuses without Triton although nothing but its kernels needs it.

    For all other models nothing changes.
    """
    choice, check = VllmConfig.use_v2_model_runner.fget, VllmConfig._validate_v2_model_runner

    def is_ours(config: VllmConfig) -> bool:
        return config.model_config is not None and config.model_config.is_diffusion

    VllmConfig.use_v2_model_runner = property(lambda config: is_ours(config) or choice(config))
    VllmConfig._validate_v2_model_runner = lambda config: None if is_ours(config) else check(config)
