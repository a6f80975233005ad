"""Load a model, generate with it, score with it: in one process, for notebooks, tests and evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhub.algorithm.batching import sequence_batch
from rlhub.algorithm.scoring import token_log_probs
from rlhub.checkpoints.sealed import resolve_model_path
from rlhub.checkpoints.tokenizers import decode, encode_prompts, load_tokenizer
from rlhub.checkpoints.weights import load_network
from rlhub.config.checks import check_sampler
from rlhub.config.schema import Cache, SamplerConfig
from rlhub.errors import UserError
from rlhub.likelihoods import sequence_draws
from rlhub.networks.layout import pack_layout, to_device
from rlhub.noise import Noise
from rlhub.parts import load_part, part_names
from rlhub.records.progress import RunProgress
from rlhub.types import Credit, Request, Rollout

Prompt = str | list[dict[str, str]] | Sequence[int] | np.ndarray  # text, chat messages, or token ids

EXACT = "all_masks"  # the views behind `views="exact"`
TOKENS_AT_ONCE = 4096  # rows are scored in groups of about this many tokens


class Model:
    """A network with its tokenizer, which is read when first asked for: token ids work without one.

    Attributes:
        network: the family's `torch.nn.Module`; its parameters are what an optimizer takes.
        path: the folder that it was loaded from, None for one of random weights.
    """

    def __init__(
        self, network: torch.nn.Module, path: Path | None = None, device: torch.device | str = "cpu", tokenizer: Any = None
    ) -> None:
        self.network, self.path, self.device = network.to(device), path, torch.device(device)
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the model.

        Raises:
            CheckpointError: there is none.
        """
        return load_tokenizer(str(self.path))

    @property
    def mask_id(self) -> int:
        return self.network.mask_id

    @property
    def eos_id(self) -> int:
        return self.network.eos_id

    def logits(self, tokens: Tensor | np.ndarray | Sequence[Sequence[int]], gradient: bool = False) -> Tensor:
        """Token ids [B, L] -> logits [B, L, V]; position i scores token i for every family.

        Args:
            gradient: keep the graph, so that a loss of yours can go back through it; `token_log_probs` needs far less memory.
        """
        tokens = torch.as_tensor(tokens, device=self.device)
        rows, length = tokens.shape
        with torch.set_grad_enabled(gradient):
            hidden = self.network.denoise(tokens.flatten(), to_device(pack_layout([length] * rows), self.device))
            return self.network.head(hidden, torch.arange(rows * length, device=self.device)).view(rows, length, -1)

    def decode(self, rollout: Rollout) -> str:
        """The text of a completion, through its first EOS or end of turn."""
        return decode(self.tokenizer, rollout.completion_ids[: rollout.length])

    def save(self, folder: str | Path) -> Path:
        """Write weights and tokenizer in the Hugging Face layout of the family, as `load_model` reads them; returns the folder."""
        from rlhub.checkpoints.weights import save_network

        save_network(self.network, Path(folder), vars(self).get("tokenizer"))
        return Path(folder)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model in a folder of its family's Hugging Face layout, of a checkpoint, or the newest one of a run.

    Raises:
        CheckpointError: nothing there can be loaded.

    Example:
        >>> model = load_model("runs/sort")                                       # doctest: +SKIP
        >>> model.logits([[5, 3, model.mask_id]]).shape                           # doctest: +SKIP
        torch.Size([1, 3, 32])
    """
    folder = resolve_model_path(Path(path))
    return Model(load_network(folder, device=device, progress=True), folder, device)


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    sampler: str = "low_confidence",
    length: int = 128,
    steps: int = 64,
    block_length: int = 32,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 0.0,
    cache: Cache = "exact",
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> list[Rollout]:
    """One completion per prompt; `completion_ids` holds its tokens.

    The completion of prompt i depends on the weights, the prompt, i, the settings and the seed, not on the other prompts.

    Args:
        prompts: texts, chats, or arrays of token ids, in any mixture.
        length: tokens of the canvas; a multiple of `block_length`.
        steps: denoising steps over the whole canvas; a multiple of the number of blocks.
        top_k, top_p: draw among the `top_k` most likely tokens (0: all), then among those that together reach `top_p`.
        guidance: strength of classifier-free guidance by the prompt; 0 is off, anything else doubles the forwards.
        cache: `prefix` or `dual` reuse keys and values of a bidirectional model: faster, approximate.
        progress: show a bar.
        options: the sampler's own, such as `threshold=0.9`.

    Raises:
        ValueError: the settings do not fit together or a prompt is too long.
    """
    settings = SamplerConfig(
        name=sampler,
        length=length,
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance=guidance,
        cache=cache,
        options=options,
    )
    return generate_with(model, prompts, settings, seed, progress)


def generate_with(model: Model, prompts: Sequence[Prompt], settings: SamplerConfig, seed: int = 0, progress: bool = False) -> list[Rollout]:
    """As `generate`, with every setting of a recipe's sampler."""
    from rlhub.engines.torch_engine import Engine

    if isinstance(prompts, str):
        raise UserError("prompts is one text; give a list of prompts")
    check_sampler(settings)
    requests = [Request(uid=row, group_uid=row, prompt_ids=ids) for row, ids in enumerate(prompt_token_ids(model, prompts))]
    engine = Engine(model.network, model.device)
    done = itertools.count(1)
    with RunProgress(enabled=progress) as bar:
        bar.phase("generate", total=settings.steps * math.ceil(len(requests) / engine.max_rows))
        return engine.generate(requests, settings, Noise(seed), on_step=lambda: bar.update(next(done)))


@dataclass(frozen=True)
class Estimate:
    """log p(completion | prompt): its evidence lower bound, estimated from draws or exact, or that of one order by the chain rule.

    Attributes:
        value: nats, summed over the completion's tokens.
        standard_error: of `value`, nats; 0 when exact, NaN from a single draw.
        length: tokens of the completion.
        draws: float64 [K], the single estimates; one when exact.
    """

    value: float
    standard_error: float
    length: int
    draws: np.ndarray


def log_likelihood(
    model: Model,
    prompt: Prompt,
    completion: str | Sequence[int] | np.ndarray,
    views: str = "elbo",
    draws: int = 128,
    seed: int = 0,
    guidance: float = 0.0,
    order: str = "forward",
) -> Estimate:
    """How likely the model finds a completion: its evidence lower bound (LLaDA, arXiv 2502.09992, Eq. 6), in nats.

    Args:
        completion: text, or token ids; nothing is added, so an EOS that should count must be in it.
        views: `elbo` (one forward a draw), `coupled` (a mask and its complement, two forwards a draw, lower variance), `exact` (all
            2^L - 1 masks, for at most 12 tokens), or `chain` (revealed one by one, L forwards: no bound but that order's
            log-likelihood). A block-causal model takes each of its blocks given those before.
        order: of `chain`: forward, backward or random (a permutation that the seed decides).
        guidance: w of unsupervised classifier-free guidance in the scored log-probs (SMDM, arXiv 2410.18514, Eq. 7); doubles the forwards.

    Raises:
        ValueError: the views are unknown, the completion is empty, too long, or holds the mask token.
    """
    part = load_part("views", EXACT if views == "exact" else views)
    kind = getattr(part, "LOG_LIKELIHOOD", None)
    if kind is None:
        fitting = [name for name in part_names("views") if hasattr(load_part("views", name), "LOG_LIKELIHOOD")]
        raise UserError(f"views must be one of exact, {', '.join(fitting)}, got {views!r}")
    if draws < 1:
        raise UserError(f"draws must be at least 1, got {draws}")
    (prompt_ids,) = prompt_token_ids(model, [prompt])
    ids = completion_token_ids(model, completion)
    if len(prompt_ids) + len(ids) > model.network.max_length:
        raise UserError(f"{len(prompt_ids)} + {len(ids)} prompt and completion tokens, the model's context is {model.network.max_length}")
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance must be 0 or more, got {guidance}")
    batch = sequence_batch([prompt_ids], [ids], [0])
    sampled = kind == "draws"
    credit = Credit(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool))
    try:
        options = {"draws": draws} if sampled else {"order": order} if "order" in part.Config.__dataclass_fields__ else {}
        rows = part.make(batch, credit, part.Config(**options), Noise(seed).stream("views"), 0, model.network.profile)
    except ValueError as error:
        raise UserError(str(error)) from error
    log_prob = token_log_probs(model.network, rows, TOKENS_AT_ONCE, model.device, guidance)
    estimates = sequence_draws(log_prob.double(), rows)[0].numpy()
    error = 0.0 if not sampled else float(estimates.std(ddof=1) / math.sqrt(draws)) if draws > 1 else math.nan
    return Estimate(float(estimates.mean()), error, len(ids), estimates)


def prompt_token_ids(model: Model, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """int32 [Lp] of each prompt; text and chats go through the tokenizer together."""
    worded = [isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict)) for prompt in prompts]
    encoded = iter(encode_prompts(model.tokenizer, list(itertools.compress(prompts, worded))) if any(worded) else [])
    return [next(encoded) if is_text else _checked_ids(model, prompt, "prompt") for prompt, is_text in zip(prompts, worded, strict=True)]


def completion_token_ids(model: Model, completion: str | Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(completion, str):
        completion = model.tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids = _checked_ids(model, completion, "completion")
    if not len(ids):
        raise UserError("the completion has no tokens")
    if (ids == model.mask_id).any():
        raise UserError(f"the completion holds the mask token {model.mask_id}, which no model predicts; score finished completions only")
    return ids


def _checked_ids(model: Model, ids: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise UserError(f"a {what} is text, chat messages or a row of token ids, got {ids!r:.80}")
    if array.size and not 0 <= array.min() <= array.max() < model.network.vocab_size:
        raise UserError(f"the {what} has token ids {array.min()} to {array.max()}, the vocabulary has 0 to {model.network.vocab_size - 1}")
    return array.astype(np.int32)
