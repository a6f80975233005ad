"""The stack that most families share: pre-norm attention with rotary embedding, then a SwiGLU or a mixture of experts.

Modules sit under the family's published names, so that a state dict goes in and out unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.errors import CheckpointError
from rlhub.networks.attention import Attention, Kernel
from rlhub.networks.cache import CacheView, KeyValueCache
from rlhub.networks.layers import RMSNorm, enough_rows, rotary_tables, rotate, whole_vectors
from rlhub.networks.profile import Profile
from rlhub.types import Layout

if TYPE_CHECKING:
    from rlhub.checkpoints.origin import Origin

# ------------------------------------------------------------------------------------------------------------------- config


class Published:
    """Base of a family's frozen dataclass `Config`, whose fields are those of the published config.json that shape the network.

    A subclass is a dataclass with the class attributes below, and says what `Shape` its fields make.
    """

    ARCHITECTURES: ClassVar[tuple[str, ...]]
    MODEL_TYPE: ClassVar[str]
    eos_token_id: int  # fields of every family
    vocab_size: int
    FIXED: ClassVar[dict[str, Any]] = {}  # further fields and the only value that is computed; it is also their default

    def shape(self) -> Shape:
        raise NotImplementedError

    def resolved(self) -> dict[str, Any]:
        """Values of the fields that may be None because others decide them."""
        return {}

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.shape().max_length

    def stop_ids(self, *further: int) -> tuple[int, ...]:
        """EOS and those further ids that this vocabulary has; a small model of one's own does not have the published ones."""
        return tuple(dict.fromkeys([self.eos_token_id, *(token for token in further if token < self.vocab_size)]))

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Self:
        """Read a published config.json; layouts that this code does not compute are refused.

        Raises:
            CheckpointError: a field has a value that is not supported, or makes no network.
        """
        name = cls.MODEL_TYPE
        for key, value in cls.FIXED.items():
            given = config.get(key, value)
            if given is not None and given != value and (given or value):
                raise CheckpointError(f"{name} config has {key}={given!r}; only {value!r} is supported")
        types = get_type_hints(cls)
        known = {field.name: types[field.name] for field in fields(cls) if field.name in config}
        for key, kind in known.items():
            if not isinstance(config[key], int | float if kind is float else kind):
                raise CheckpointError(f"{name} config has {key}={config[key]!r}; expected {getattr(kind, '__name__', kind)}")
        try:
            return cls(**{key: config[key] for key in known})
        except ValueError as error:
            raise CheckpointError(f"{name} config has {error}") from None

    def to_published(self) -> dict[str, Any]:
        """The config.json of the family's Hugging Face layout."""
        values = self.FIXED | {field.name: getattr(self, field.name) for field in fields(self)} | self.resolved()
        present = {key: value for key, value in values.items() if value is not None}
        return {"architectures": [self.ARCHITECTURES[0]], "model_type": self.MODEL_TYPE, **present}


@dataclass(frozen=True)
class Llama(Published):
    """Field names of Llama's config.json, which most families took over."""

    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 160
    vocab_size: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    mask_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int | None = None

    FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "rope_scaling": None, "rope_parameters": None, "use_sliding_window": False}

    def __post_init__(self) -> None:
        shape = self.shape()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}")
        if shape.head_dim % 2:
            raise ValueError(f"head_dim={shape.head_dim} is odd: rotary embedding pairs dimensions")
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"num_attention_heads={shape.num_heads} is not a multiple of num_key_value_heads={shape.num_kv_heads}")

    def shape(self) -> Shape:
        """The sizes that the stack is built from, in the words of `Shape`."""
        return Shape(
            width=self.hidden_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_attention_heads,
            mlp_width=self.intermediate_size,
            vocab_size=self.vocab_size,
            num_embeddings=self.vocab_size,
            max_length=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tied=self.tie_word_embeddings,
            init_std=self.initializer_range,
        )

    def resolved(self) -> dict[str, Any]:
        return {"num_key_value_heads": self.num_key_value_heads or self.num_attention_heads, "pad_token_id": self.pad_id}

    @property
    def pad_id(self) -> int:
        """EOS where nothing else is named."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of a decoder.

    Attributes:
        num_embeddings: rows of the embedding, of which the first `vocab_size` are tokens.
        rotary_dim: dimensions of a head that turn with the position; None is all of them.
        qkv_bias: queries, keys and values have biases (Qwen2).
        qk_norm: queries and keys of each head are normed before they turn (Qwen3).
        tied: the embedding is the output head as well.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    num_embeddings: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    init_std: float = 0.02


@dataclass(frozen=True)
class Names:
    """Published names of the modules; those from `attention_norm` on are relative to a layer. `qkv` replaces the three before it."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: str | None = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def lora_targets(self) -> str:
        """Regular expression of every linear map inside the layers, and of nothing else: LLaDA's head is called like its MLP's way down."""
        inner = (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)
        return rf".*\.{self.layers.rpartition('.')[2]}\.\d+\.({'|'.join(map(re.escape, inner))})"


# ------------------------------------------------------------------------------------------------------------------ modules


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module under a dotted path, with the containers on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.ModuleDict())
        root = root._modules[parent]
    root.add_module(name, module)


class Block(nn.Module):
    """One layer.

    Args:
        mlp: instead of the SwiGLU of `names.gate`, `names.up` and `names.down`; [T, D] -> [T, D].
    """

    def __init__(self, shape: Shape, names: Names, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.shape, self.names, self.dense = shape, names, mlp is None
        query_width, kv_width = (heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
        place(self, names.attention_norm, RMSNorm(shape.width, shape.norm_eps))
        place(self, names.mlp_norm, RMSNorm(shape.width, shape.norm_eps))
        if names.qkv is None:
            for name, width in ((names.query, query_width), (names.key, kv_width), (names.value, kv_width)):
                place(self, name, nn.Linear(shape.width, width, bias=shape.qkv_bias))
        else:
            place(self, names.qkv, nn.Linear(shape.width, query_width + 2 * kv_width, bias=shape.qkv_bias))
        if shape.qk_norm:
            place(self, names.query_norm, RMSNorm(shape.head_dim, shape.norm_eps))
            place(self, names.key_norm, RMSNorm(shape.head_dim, shape.norm_eps))
        place(self, names.output, nn.Linear(query_width, shape.width, bias=False))
        if mlp is None:
            place(self, names.gate, nn.Linear(shape.width, shape.mlp_width, bias=False))
            place(self, names.up, nn.Linear(shape.width, shape.mlp_width, bias=False))
            place(self, names.down, nn.Linear(shape.mlp_width, shape.width, bias=False))
        else:
            place(self, names.mlp, mlp)

    def apply_to(self, name: str, hidden: Tensor) -> Tensor:
        """The output of the module with this name."""
        return self.get_submodule(name)(hidden)

    def project_by(self, name: str, hidden: Tensor) -> Tensor:
        """The output of the linear module with this name, [T, D] -> [T, E]; see `enough_rows`."""
        return self.apply_to(name, enough_rows(hidden))[: len(hidden)]

    def heads(self, name: str, hidden: Tensor) -> Tensor:
        """[T, D] -> [T, H, head_dim]"""
        return self.project_by(name, hidden).unflatten(-1, (-1, self.shape.head_dim))

    def project(self, normed: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `rows` (None: of all) and keys and values of all, [T, H, head_dim] each."""
        if self.names.qkv is None:
            query = self.heads(self.names.query, normed if rows is None else normed[rows])
            return query, self.heads(self.names.key, normed), self.heads(self.names.value, normed)
        shape = self.shape
        query, key, value = self.heads(self.names.qkv, normed).split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        return query if rows is None else query[rows], key, value

    def feed_forward(self, normed: Tensor) -> Tensor:
        if not self.dense:
            return self.apply_to(self.names.mlp, normed)
        gate, up = self.project_by(self.names.gate, normed), self.project_by(self.names.up, normed)
        return self.project_by(self.names.down, whole_vectors(F.silu, gate) * up)

    def forward(self, hidden: Tensor, tables: tuple[Tensor, Tensor], attend: Kernel, rows: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], or [M, D] for the tokens `rows` [M] alone; the keys and values are those of all tokens."""
        normed = self.apply_to(self.names.attention_norm, hidden)
        query, key, value = self.project(normed, rows)
        if self.shape.qk_norm:
            query, key = self.apply_to(self.names.query_norm, query), self.apply_to(self.names.key_norm, key)
        key = rotate(key, tables)
        if rows is not None:
            hidden, tables = hidden[rows], tuple(table[rows] for table in tables)
        mixed = attend(rotate(query, tables), key, value)
        if not len(hidden):  # the call was made for the cache
            return hidden
        hidden = hidden + self.project_by(self.names.output, mixed)
        return hidden + self.feed_forward(self.apply_to(self.names.mlp_norm, hidden))


class Decoder(nn.Module):
    """A network of a family, as `rlhub.models` describes it.

    Args:
        config: the family's, kept for `to_published`.
        mlp: makes the feed-forward module of a layer from its number; None there is the dense SwiGLU.
    """

    attention = "sdpa"
    origin: Origin | None = None  # set by what loads it from a folder

    def __init__(
        self,
        config: Published,
        profile: Profile,
        names: Names = Names(),
        mlp: Callable[[int], nn.Module | None] = lambda layer: None,
    ) -> None:
        super().__init__()
        self.config, self.profile, self.names, self.shape = config, profile, names, config.shape()
        shape = self.shape
        place(self, names.embedding, nn.Embedding(shape.num_embeddings, shape.width))
        place(self, names.layers, nn.ModuleList(self.make_block(mlp(layer)) for layer in range(shape.num_layers)))
        place(self, names.norm, RMSNorm(shape.width, shape.norm_eps))
        if not shape.tied:
            place(self, names.head, nn.Linear(shape.width, shape.num_embeddings, bias=False))

    def make_block(self, mlp: nn.Module | None) -> nn.Module:
        return Block(self.shape, self.names, mlp)

    @property
    def mask_id(self) -> int:
        return self.profile.mask_id

    @property
    def eos_id(self) -> int:
        return self.profile.eos_id

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def max_length(self) -> int:
        return self.shape.max_length

    def initialize(self, generator: torch.Generator) -> Self:
        """Draw fresh weights: normal(0, init_std), residual outputs scaled by 1 / sqrt(2 layers) as in OLMo's "mitchell" scheme."""
        residual = (2 * self.shape.num_layers) ** -0.5
        ends = tuple(f"{name.rpartition('.')[2]}.weight" for name in (self.names.output, self.names.down))
        inside = f"{self.names.layers}."
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                scale = residual if name.startswith(inside) and name.endswith(ends) else 1.0
                parameter.normal_(0.0, self.shape.init_std * scale, generator=generator)
        return self

    def new_cache(self, num_slots: int, max_length: int) -> KeyValueCache:
        """An empty cache of the network's type and device."""
        weight, shape = self.get_submodule(self.names.embedding).weight, self.shape
        return KeyValueCache(shape.num_layers, num_slots, max_length, shape.num_kv_heads, shape.head_dim, weight.dtype, weight.device)

    def denoise(self, tokens: Tensor, layout: Layout, targets: Tensor | None = None, cache: CacheView | None = None) -> Tensor:
        """Hidden states after the final norm, [T, D], or [M, D] for `targets` [M]; see `rlhub.models`.

        Raises:
            ValueError: a cache with gradient, or the layout asks for what the family cannot do.
        """
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache serves inference only; call denoise under torch.no_grad()")
        sources = self._sources(layout, targets, cache is not None)
        block_length = self.profile.block_length if self.profile.attention == "block_causal" else None
        hidden = self.get_submodule(self.names.embedding)(tokens.long())
        attention = Attention(layout, self.attention, hidden.dtype, block_length, cache)
        tables = rotary_tables(layout.position_ids, self.shape.rotary_dim or self.shape.head_dim, self.shape.rope_theta)
        *blocks, last = self.get_submodule(self.names.layers)
        for number, block in enumerate(blocks):
            hidden = block(hidden, tables, lambda *heads, number=number: attention.attend(number, *heads))
        norm = self.get_submodule(self.names.norm)
        if targets is None:
            hidden = norm(last(hidden, tables, lambda *heads: attention.attend(len(blocks), *heads)))
            return hidden if sources is None else hidden[sources]
        rows, order = sources.sort(stable=True)
        kernel = attention.kernel_for(rows)
        hidden = norm(last(hidden, tables, lambda *heads: attention.attend(len(blocks), *heads, kernel), rows))  # type: ignore[call-arg]
        return hidden[order.argsort()]

    def hidden_states(self, tokens: Tensor, position_ids: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Hidden states [T, D] after the final norm, with the attention left to others; the logit shift is not applied.

        Args:
            attend: (layer, query, key, value [T, H, head_dim]) -> [T, H * head_dim].
        """
        hidden = self.get_submodule(self.names.embedding)(tokens.long())
        tables = rotary_tables(position_ids, self.shape.rotary_dim or self.shape.head_dim, self.shape.rope_theta)
        for number, block in enumerate(self.get_submodule(self.names.layers)):
            hidden = block(hidden, tables, partial(attend, number))
        return self.get_submodule(self.names.norm)(hidden)

    def head(self, hidden: Tensor, target_rows: Tensor | None = None) -> Tensor:
        """Logits [M, V] of the hidden states at `target_rows` [M], or of all; padding rows of the embedding are cut off."""
        selected = hidden if target_rows is None else hidden[target_rows]
        enough = enough_rows(selected)
        if self.shape.tied:
            logits = F.linear(enough, self.get_submodule(self.names.embedding).weight)
        else:
            logits = self.get_submodule(self.names.head)(enough)
        return logits[: len(selected), : self.vocab_size]

    def _sources(self, layout: Layout, targets: Tensor | None, cached: bool) -> Tensor | None:
        """int64 [M], the packed tokens whose hidden states predict the targets: with a logit shift the one before, within its segment.

        The first token of a segment is predicted by itself. None: each of all tokens by itself.
        """
        if not self.profile.logit_shift:
            return None if targets is None else targets.long()
        if layout.attention == "block_diffusion":
            raise ValueError("block_diffusion layouts are not defined for a family that predicts each token from the one before")
        position, segment, index = (
            layout.position_ids,
            layout.segment_ids,
            torch.arange(len(layout.position_ids), device=layout.position_ids.device),
        )
        first = torch.zeros_like(index, dtype=torch.bool)
        first[layout.row_offsets.long()[:-1]] = True
        first[1:] |= segment[1:] != segment[:-1]
        if cached:
            gap = position.diff(prepend=position[:1]) != 1
            lost = (first | gap) & (position > 0)
            asked = index if targets is None else targets.long()
            if targets is not None and bool(lost[asked].any()):
                missing = int(position[asked[lost[asked]][0]]) - 1
                raise ValueError(f"the token at position {missing} predicts the next one and is not among the tokens; give it with them")
            first |= gap
        source = torch.where(first, index, index - 1)
        return source if targets is None else source[targets.long()]
