"""RADD: absorbing diffusion without time as an input (Ou et al. 2024, arXiv 2406.03736), from 0.1B to 0.4B parameters.

Covers JingyangOu/radd-lambda-dce and -t-dce, whose config.json names no architecture: it is known by its fields. LayerNorm, fused queries,
keys and values, a GELU MLP, rotary embedding; GPT-2's tokens and the mask after them. The published network returns log-probs over the
tokens without the mask; here the mask's logit is a constant that gives it probability 0, which is the same after the softmax. Dropout,
0.02 in their training, is left out.

The concrete score of absorbing diffusion is an analytic function of time times p(token | visible tokens) (Theorem 1), which is why the
network needs no time; `rlhub.oracle.absorbing` has the losses that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.errors import CheckpointError
from rlhub.networks.decoder import Block, Decoder, Names, Published, Shape, place
from rlhub.networks.profile import Profile

ARCHITECTURES = ("RADD",)
NAMES = Names(
    embedding="vocab_embed",
    layers="blocks",
    norm="output_layer.norm_final",
    head="output_layer.linear",
    attention_norm="norm1",
    mlp_norm="norm2",
    qkv="attn_qkv",
    output="attn_out",
    down="mlp.2",
)
NORM_EPS = 1e-5
MLP_RATIO = 4
NEVER = -1e9  # a logit of probability 0; finite, because guidance takes differences of logits
THETA = 10000.0
TINY = {"tokens": 15, "model": {"hidden_size": 32, "n_blocks": 2, "n_heads": 4, "length": 64}}


def recognizes(config: dict[str, Any]) -> bool:
    """Whether a config.json without `architectures` is RADD's."""
    model = config.get("model")
    return isinstance(config.get("tokens"), int) and isinstance(model, dict) and {"n_blocks", "n_heads", "length"} <= set(model)


def check_mask(config: dict[str, Any], family: str, tokens: Any) -> None:
    """Refuses a mask token of its own in a family whose mask comes after its tokens.

    Raises:
        CheckpointError: the config names another mask token.
    """
    if config.get("mask_token_id", tokens) != tokens:
        raise CheckpointError(
            f"{family} config has mask_token_id={config['mask_token_id']!r}; the mask is the token after the {tokens} others"
        )


@dataclass(frozen=True)
class Config(Published):
    """The fields of the published config.json that shape the network; all but `tokens` lie in its section `model`."""

    tokens: int = 50257
    hidden_size: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    length: int = 1024
    init_std: float = 0.02

    ARCHITECTURES: ClassVar[tuple[str, ...]] = ARCHITECTURES
    MODEL_TYPE: ClassVar[str] = "radd"

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.n_heads):
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 2 * n_heads={self.n_heads}: rotary pairs dimensions")

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Self:
        """Read a published config.json.

        Raises:
            CheckpointError: a field has a value that is not supported, or makes no network.
        """
        model = config.get("model", {})
        if not isinstance(model, dict) or model.get("type", "ddit_wot") != "ddit_wot":
            raise CheckpointError(f"radd config has model={model!r:.80}; only type 'ddit_wot', the network without time, is supported")
        check_mask(config, cls.MODEL_TYPE, config.get("tokens", cls.tokens))
        return super().from_published(config | model)

    def to_published(self) -> dict[str, Any]:
        model = {
            "type": "ddit_wot",
            "hidden_size": self.hidden_size,
            "length": self.length,
            "n_blocks": self.n_blocks,
            "n_heads": self.n_heads,
            "dropout": 0.02,
            "use_checkpoint": False,
            "dtype": "float32",
        }
        noise = {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20}
        return {"architectures": list(ARCHITECTURES), "tokens": self.tokens, "init_std": self.init_std, "model": model, "noise": noise}

    def shape(self) -> Shape:
        """The sizes that the stack is built from, in the words of `Shape`."""
        return Shape(
            width=self.hidden_size,
            num_layers=self.n_blocks,
            num_heads=self.n_heads,
            num_kv_heads=self.n_heads,
            head_dim=self.hidden_size // self.n_heads,
            mlp_width=MLP_RATIO * self.hidden_size,
            vocab_size=self.tokens + 1,
            num_embeddings=self.tokens + 1,
            max_length=self.length,
            norm_eps=NORM_EPS,
            rope_theta=THETA,
            init_std=self.init_std,
        )


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(hidden.dtype)


class Embedding(nn.Module):
    """An embedding whose table is called `embedding`."""

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num_embeddings, width))

    @property
    def weight(self) -> Tensor:
        return self.embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)


class Frequencies(nn.Module):
    """The rotary frequencies that checkpoints hold; angles are computed anew in fp32, whatever the checkpoint's precision."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / THETA ** (torch.arange(0, head_dim, 2).float() / head_dim))


class NormedBlock(Block):
    """A layer with layer norms and a GELU MLP."""

    def __init__(self, shape: Shape, names: Names) -> None:
        mlp = nn.Sequential(nn.Linear(shape.width, shape.mlp_width), nn.GELU("tanh"), nn.Linear(shape.mlp_width, shape.width))
        super().__init__(shape, names, mlp)
        for name in (names.attention_norm, names.mlp_norm):
            place(self, name, LayerNorm(shape.width, NORM_EPS))

    def feed_forward(self, normed: Tensor) -> Tensor:
        return self.project_by(self.names.mlp, normed)


class RADD(Decoder):
    """The network behind `rlhub.load_model` for RADD checkpoints."""

    def __init__(self, config: Config) -> None:
        profile = Profile(
            mask_id=config.tokens,
            eos_id=config.tokens - 1,
            stop_ids=(config.tokens - 1,),
            pad_id=config.tokens - 1,
            lora_targets=r"(.*\.)?blocks\.\d+\.(attn_qkv|attn_out|mlp\.0|mlp\.2)",
        )
        super().__init__(config, profile, NAMES)
        place(self, NAMES.embedding, Embedding(self.shape.num_embeddings, self.shape.width))
        place(self, NAMES.norm, LayerNorm(self.shape.width, NORM_EPS))
        place(self, NAMES.head, nn.Linear(self.shape.width, self.shape.num_embeddings))
        self.rotary_emb = Frequencies(self.shape.head_dim)

    def make_block(self, mlp: nn.Module | None) -> nn.Module:
        return NormedBlock(self.shape, self.names)

    def head(self, hidden: Tensor, target_rows: Tensor | None = None) -> Tensor:
        """Logits [M, V], `NEVER` for the mask; see `rlhub.models`."""
        return F.pad(super().head(hidden, target_rows)[:, :-1], (0, 1), value=NEVER)


build = RADD
