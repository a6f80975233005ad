"""What the model says of single positions: the drawn token, its log-probs and what a sampler asks for. Logits exist in slices only.

The draw is an exponential race: with E_v = -log(1 - u_v), the token with the smallest E_v / p_v is an exact draw from p. The uniforms are
keyed by (uid, step, position), one for each token of the vocabulary, so a draw does not depend on what else is computed. Statistics are
fp32 sums over the vocabulary; everything per position is float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhub.engines import device_noise
from rlhub.noise import Stream, from_lower_bounds

# Logits that exist at once; small vocabularies are done in one go. 2^22 are 131 rows of a vocabulary of 32,000. Each slice reads the
# head's weights and starts some hundred kernels, so a GPU gets larger ones: 256 MiB of fp32.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "gpu": 1 << 26}
# E_v / p_v of the winner is exponential with mean 1 / sum p, so it exceeds REACH means once in e^16 draws; then the whole race is run.
REACH = 16.0
_NUMBERS_AT_ONCE = 1 << 16  # uniforms that fit into a core's cache
_NUMBERS_ON_DEVICE = 1 << 24  # float64 uniforms of 128 MiB, and a few times that while they are made
_NEVER = -1e30  # score of a token that cannot be drawn: its weight is 0, and times 0 it is 0, which an infinity is not


@dataclass(frozen=True)
class Law:
    """How tokens are drawn: without the banned ones, after temperature, then top-k, then top-p; the best one at temperature 0."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    banned: tuple[int, ...] = ()


class TokenNoise:
    """The keyed noise of M positions.

    Args:
        uid, step, position: int64 [M] each, on the scores' device; see `rlhub.engines.device_noise.uniforms`.
    """

    def __init__(self, stream: Stream, uid: Tensor, step: Tensor, position: Tensor) -> None:
        self.stream, self.key = stream, (uid, step, position)

    @functools.cached_property
    def keys(self) -> list[tuple[int, int, int]]:
        """(uid, step, position) of each, on the host."""
        return device_noise.host_keys(*self.key)

    def race(self, scores: Tensor, weights: Tensor, total: Tensor, first: int) -> Tensor:
        """int64 [m], the winners of positions `first` to `first + m`, the lowest id of equals.

        Uniforms are the same on every device and times are float64, so winners can differ between devices only where two tokens' scores
        less log times lie within the rounding of float64 logarithms, some 1e-15 of their size.

        Args:
            scores: fp32 [m, V], log p up to a constant of each row.
            weights: fp32 [m, V], exp(scores) = p up to the same constant. May be overwritten.
            total: [m], sums of the weights.
        """
        if device_noise.on_host(scores.device):
            return self.race_on_host(scores, weights, total, first)
        return self.race_on_device(scores, first)

    def race_on_device(self, scores: Tensor, first: int) -> Tensor:
        """`race` without the host, which does not wait for it: every token's time."""
        count, vocab_size = scores.shape
        together = max(1, _NUMBERS_ON_DEVICE // vocab_size)
        winners = []
        for start in range(0, count, together):
            part = scores[start : start + together]
            key = (values[first + start : first + start + len(part)] for values in self.key)
            times = device_noise.philox_uniforms(self.stream, vocab_size, *key).neg_().log1p_().neg_()
            winners.append((part - times.log_()).argmax(1))
        return torch.cat(winners)

    def race_on_host(self, scores: Tensor, weights: Tensor, total: Tensor, first: int, reach: float = REACH) -> Tensor:
        """`race` with numpy, and with logarithms only where they may matter.

        Another token than v wins if E_v >= c p_v for a c that some token beats, and E_v >= u_v. So logarithms are needed only where
        u_v < c p_v, for about `reach` tokens of a position when c is `reach` / sum p.
        """
        count, vocab_size = weights.shape
        bounds = weights.mul_((reach / total)[:, None]).cpu().numpy()
        together = max(1, _NUMBERS_AT_ONCE // vocab_size)
        uniforms = np.empty((min(together, count), vocab_size))
        found = []
        for start in range(0, count, together):
            part = uniforms[: min(together, count - start)]
            for row, (uid, step, position) in zip(part, self.keys[first + start :], strict=False):
                self.stream.lower_bounds(row, uid=uid, step=step, position=position)
            index = np.flatnonzero(part < bounds[start : start + together])
            found.append((index + start * vocab_size, part.reshape(-1)[index]))
        index, low = (np.concatenate(parts) for parts in zip(*found, strict=True))
        row, token = np.divmod(index, vocab_size)
        logits = scores.flatten()[torch.from_numpy(index).to(scores.device)].double().cpu().numpy()
        score = logits - _log_exponential(from_lower_bounds(low))
        best = np.full(count, -np.inf)
        np.maximum.at(best, row, score)
        winners = np.zeros(count, dtype=np.int64)
        first_best = np.flatnonzero(score == best[row])[::-1]  # the lowest id is written last, and stands
        winners[row[first_best]] = token[first_best]
        certain = best > torch.log(total.double()).cpu().numpy() - math.log(reach) + 1e-4
        for row in np.flatnonzero(~certain):
            uid, step, position = self.keys[first + row]
            noise = _log_exponential(self.stream.uniform(vocab_size, uid=uid, step=step, position=position))
            winners[row] = np.argmax(scores[row].double().cpu().numpy() - noise)
        return torch.from_numpy(winners).to(scores.device)


def _log_exponential(uniforms: np.ndarray) -> np.ndarray:
    """log E of standard exponentials E from uniforms; log1p keeps small ones exact."""
    return np.log(-np.log1p(-uniforms))


def streamed_stats(
    logits_of: Callable[[slice], Tensor],
    count: int,
    vocab_size: int,
    law: Law,
    noise: TokenNoise | None,
    needs: Collection[str],
    device: torch.device,
) -> dict[str, Tensor]:
    """Statistics of `count` positions, a slice of their logits at a time.

    Args:
        logits_of: fp32 [m, V] of a slice of the positions; overwritten.
        noise: None at temperature 0.
        needs: fields of `RowStats` beyond token, logp_model and logp_sample.
        device: of the logits.

    Returns:
        [count] each, by field.
    """
    rows = max(2, LOGITS_AT_ONCE["cpu" if device.type == "cpu" else "gpu"] // vocab_size)
    parts = []
    for start in range(0, count, rows):
        parts.append(describe(logits_of(slice(start, min(start + rows, count))), law, noise, start, needs))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def describe(logits: Tensor, law: Law, noise: TokenNoise | None, first: int, needs: Collection[str]) -> dict[str, Tensor]:
    """The statistics of `streamed_stats` for positions from `first` on, from their logits fp32 [m, V], which are overwritten.

    What may not be drawn keeps its share of the model's law, whose log-probs are those that training computes.
    """
    banned = torch.cat([logits[:, :0], *(logits[:, token_id : token_id + 1] for token_id in law.banned)], 1).double()
    for token_id in law.banned:  # an index of several would be copied to the device, which waits for it
        logits[:, token_id] = _NEVER
    if law.temperature > 0:
        best = logits.amax(1)
    else:
        best, token = logits.max(1)  # the first one of equals
    shifted = logits.sub_(best[:, None])
    allowed = _Softmax(shifted, shifted.exp())
    model = _WithBanned(allowed, banned.sub_(best[:, None]))
    stats = {"entropy": model.entropy, "margin": model.margin, "top_logp": lambda: -model.log_total}
    found = {name: stats[name]() for name in stats if name in needs}
    drawing = allowed
    if law.temperature > 0:
        drawing = _drawing_law(allowed, law)
    stats = {"law_entropy": drawing.entropy, "law_margin": drawing.margin}
    found |= {name: stats[name]() for name in stats if name in needs}
    if law.temperature > 0:
        token = noise.race(drawing.scores, drawing.weights, drawing.total, first)
    found["token"] = token
    found["logp_model"] = model.log_prob(token)
    if "law_logp" in needs:
        found["law_logp"] = drawing.log_prob(token)
    found["logp_sample"] = drawing.log_prob(token) if law.temperature > 0 else torch.zeros_like(found["logp_model"])
    return found


class _Softmax:
    """A law over the vocabulary: scores fp32 [m, V] with a maximum of 0, and their exponentials."""

    def __init__(self, scores: Tensor, weights: Tensor) -> None:
        self.scores, self.weights, self.total = scores, weights, weights.sum(1)
        self.log_total = self.total.double().log()

    def log_prob(self, token: Tensor) -> Tensor:
        """float64 [m]."""
        return self.scores.gather(1, token[:, None]).squeeze(1).double() - self.log_total

    def mean_score(self) -> Tensor:
        """float64 [m]."""
        return (torch.einsum("mv,mv->m", self.weights, self.scores) / self.total).double()

    def entropy(self) -> Tensor:
        """float64 [m], nats."""
        return self.log_total - self.mean_score()

    def margin(self) -> Tensor:
        """float64 [m], probability of the best token minus that of the second."""
        first, second = self.weights.topk(2).values.double().unbind(1)
        return (first - second) / self.total.double()


class _WithBanned:
    """The law over the whole vocabulary: one over what may be drawn, and the scores float64 [m, b] of the rest."""

    def __init__(self, allowed: _Softmax, scores: Tensor) -> None:
        self.allowed, self.scores = allowed, scores
        self.total = allowed.total.double() + scores.exp().sum(1)
        self.log_total = self.total.log()
        self.share = allowed.total / self.total  # probability of what may be drawn

    def log_prob(self, token: Tensor) -> Tensor:
        """float64 [m], of tokens that may be drawn."""
        return self.allowed.scores.gather(1, token[:, None]).squeeze(1).double() - self.log_total

    def entropy(self) -> Tensor:
        """float64 [m], nats."""
        rest = (self.scores - self.log_total[:, None]).exp()
        return self.log_total - self.share * self.allowed.mean_score() - (rest * self.scores).sum(1)

    def margin(self) -> Tensor:
        """float64 [m], probability of the best token that may be drawn minus that of the second."""
        return self.share * self.allowed.margin()


def _drawing_law(model: _Softmax, law: Law) -> _Softmax:
    """The model's law after temperature, top-k and top-p; the model's own arrays where nothing changes."""
    truncated = 0 < law.top_k < model.scores.shape[1] or law.top_p < 1
    if law.temperature == 1 and not truncated:
        return model
    scores = model.scores / law.temperature
    if truncated:
        order = scores.sort(dim=1, descending=True, stable=True).indices
        ranked = scores.gather(1, order)
        if law.top_k:
            ranked[:, law.top_k :] = _NEVER
        share = ranked.double().softmax(1)
        ranked.masked_fill_(share.cumsum(1) - share >= law.top_p, _NEVER)
        scores.scatter_(1, order, ranked)
    return _Softmax(scores, scores.exp())
