"""Throughput of VRPO's preference step against a straightforward implementation, at equal gradient.

    python benchmarks/preference.py [--json] [--draws 8] [--micro-batch-tokens 16384] ...

Ours is what a run does: `workers.scorer.Scorer` evaluates the frozen reference, `workers.learner.Learner` takes the step of
recipes/algorithms/vrpo.yaml on packed rows, with logits only where a token is scored. Straightforward is `PlainDPO` below: every draw and
side is a forward of its own over the batch padded to its longest sequence, log-softmax at every position, one backward through all of them.

Both run in one process on one thread in fp32 with the same weights, pairs and masks, alternating, up to the gradient: the optimizer, the
same for both, is left out. The masks are part of the time of our side only. Times are process-CPU seconds, ratios the median over the
repeats. `ratio` scores the reference on both sides; `ratio_cached` takes ours from a filled reference cache, which the other side lacks.
Peaks are the rise of the resident size in the first round, null where /proc does not tell.

Ends with status 1 when the cosine of the two gradients is below 0.9999 or the ratio below 2.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhub.algorithm.pairs import Pairs
from rlhub.config.schema import AlgorithmConfig
from rlhub.models.llada import Config, LLaDA
from rlhub.networks.layers import rotary_tables, rotate
from rlhub.noise import Noise
from rlhub.types import Batch, Views
from workers.backends import torch_backend

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "algorithms" / "vrpo.yaml"
COSINE_LIMIT, RATIO_LIMIT = 0.9999, 2.5


@dataclass(frozen=True)
class Sizes:
    """Lengths are drawn log-uniformly from `shortest` to `longest`, prompts and responses alike; responses include their EOS."""

    pairs: int = 8
    draws: int = 8
    shortest: int = 16
    longest: int = 128
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 8192
    micro_batch_tokens: int = 16384  # the rows of one step, which ours need not compute twice then
    repeats: int = 3


# ------------------------------------------------------------------------------------------------------------- straightforward


def padded_logits(network: LLaDA, tokens: Tensor, filled: Tensor) -> Tensor:
    """Logits [B, W, V] at every position of padded rows [B, W]; `filled` bool [B, W] is False at padding, which no query sees."""
    config, body = network.config, network.model["transformer"]
    tables = rotary_tables(torch.arange(tokens.shape[1]), config.d_model // config.n_heads, config.rope_theta)
    visible = filled[:, None, None, :]
    hidden = body["wte"](tokens)
    for block in body["blocks"]:
        normed = block.attn_norm(hidden)
        query, key, value = (
            projection(normed).unflatten(-1, (config.n_heads, -1)) for projection in (block.q_proj, block.k_proj, block.v_proj)
        )
        heads = (part.transpose(1, 2) for part in (rotate(query, tables), rotate(key, tables), value))
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=visible)
        hidden = hidden + block.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = block.ff_norm(hidden)
        hidden = hidden + block.ff_out(F.silu(block.ff_proj(normed)) * block.up_proj(normed))
    return body["ff_out"](body["ln_f"](hidden))


@dataclass(frozen=True)
class PaddedDraw:
    """One draw of one side of every pair, all [B, W]: noisy and clean tokens, what is not padding, and the ELBO weight of each token."""

    noisy: Tensor
    clean: Tensor
    filled: Tensor
    weight: Tensor

    @classmethod
    def of(cls, views: Views, batch: Batch, side: int, draw: int) -> PaddedDraw:
        """Draw `draw` of the samples that are member `side` of their group."""
        offsets = views.layout.row_offsets.tolist()
        rows = [row for row in range(views.num_rows) if batch.member[views.sample[row]] == side and views.draw[row] == draw]
        parts = []
        for row in rows:
            sample = int(views.sample[row])
            noisy = views.tokens[offsets[row] : offsets[row + 1]].long()
            clean = torch.from_numpy(np.concatenate([batch.prompts[sample], batch.completions[sample]])).long()
            weight = torch.zeros(len(noisy))
            mine = views.score_row == row
            weight[views.score_position[mine]] = views.score_weight[mine]
            parts.append((noisy, clean, torch.ones(len(noisy), dtype=torch.bool), weight))
        return cls(*(nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*parts, strict=True)))

    def elbo(self, network: LLaDA) -> Tensor:
        """This draw's estimate [B] in nats."""
        log_prob = padded_logits(network, self.noisy, self.filled).log_softmax(-1)
        return (log_prob.gather(-1, self.clean[..., None]).squeeze(-1) * self.weight).sum(1)


@dataclass(frozen=True)
class PlainDPO:
    """DPO on ELBO margins with the SFT term (LLaDA 1.5, arXiv 2505.19223), written as one would write it first."""

    draws: tuple[list[PaddedDraw], list[PaddedDraw]]  # chosen, rejected
    response_length: Tensor  # [B], of the chosen
    beta: float
    sft_weight: float

    @classmethod
    def of(cls, views: Views, batch: Batch, config: AlgorithmConfig) -> PlainDPO:
        draws = tuple([PaddedDraw.of(views, batch, side, draw) for draw in range(views.num_draws)] for side in (0, 1))
        length = torch.from_numpy(batch.scored_length[batch.member == 0])
        return cls(draws, length, config.objective["beta"], config.auxiliary[0]["weight"])

    def loss(self, policy: LLaDA, reference: LLaDA) -> Tensor:
        """The scalar loss, its graph kept over all draws and both sides."""
        chosen, rejected = self._elbos(policy)
        with torch.no_grad():
            reference_chosen, reference_rejected = self._elbos(reference)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        return (-F.logsigmoid(self.beta * margin) - self.sft_weight * chosen / self.response_length).mean()

    def backward(self, policy: LLaDA, reference: LLaDA) -> float:
        """Add the gradient of the loss to the policy's, and return the loss."""
        loss = self.loss(policy, reference)
        loss.backward()
        return loss.item()

    def _elbos(self, network: LLaDA) -> tuple[Tensor, Tensor]:
        chosen, rejected = (torch.stack([draw.elbo(network) for draw in side]).mean(0) for side in self.draws)
        return chosen, rejected


# ------------------------------------------------------------------------------------------------------------------------ ours


class GradientOnly(torch_backend.Backend):
    """Leaves the gradient where it is."""

    def step(self) -> tuple[float, float]:
        return 0.0, 0.0


# ----------------------------------------------------------------------------------------------------------------- measurement


def measure(sizes: Sizes) -> dict[str, Any]:
    """All figures; see the module's docstring."""
    from rlhub.checkpoints.weights import save_network
    from rlhub.config.recipe import load_recipe
    from workers.learner import Learner
    from workers.scorer import Scorer

    overrides = [f"algorithm.views.draws={sizes.draws}", "learner.backend=torch", f"learner.micro_batch_tokens={sizes.micro_batch_tokens}"]
    recipe = load_recipe(RECIPE, overrides)
    reference, policy = make_networks(sizes)
    with tempfile.TemporaryDirectory() as folder:
        save_network(reference, Path(folder, "reference"))
        save_network(policy, Path(folder, "policy"))
        learner = Learner(str(Path(folder, "policy")), recipe.learner, recipe.run.seed, threads=1)
        scorer = Scorer(str(Path(folder, "reference")), recipe.learner.micro_batch_tokens)
    learner.begin(recipe.algorithm, recipe.learner.optimizer, 1)
    learner.backend = GradientOnly(learner.network, recipe.learner.optimizer, 1, recipe.learner)
    batch = make_pairs(sizes).batch(range(sizes.pairs))
    credited = learner.algorithm.credited(batch)
    (views,) = learner.make_views(credited)
    plain = PlainDPO.of(views, batch, recipe.algorithm)
    rounds = []
    for _ in range(sizes.repeats):
        learner.network.zero_grad()
        policy.zero_grad()
        score = Timed.of(scorer.estimate, recipe.algorithm, recipe.run.seed, credited)
        step = Timed.of(learner.step, credited, None, score.result)
        rounds.append((score, step, Timed.of(plain.backward, policy, reference)))
    loss = rounds[-1][2].result
    cached = [step.seconds for _, step, _ in rounds]
    live = [score.seconds + step.seconds for score, step, _ in rounds]
    straightforward = [other.seconds for _, _, other in rounds]
    return {
        "pairs_per_s": sizes.pairs / median(live),
        "pairs_per_s_cached": sizes.pairs / median(cached),
        "pairs_per_s_straightforward": sizes.pairs / median(straightforward),
        "ratio": median(other / own for other, own in zip(straightforward, live, strict=True)),
        "ratio_cached": median(other / own for other, own in zip(straightforward, cached, strict=True)),
        "cosine": F.cosine_similarity(gradient(learner.network), gradient(policy), dim=0).item(),
        "loss": loss,
        "loss_relative_difference": abs(step.result["loss"] - loss) / abs(loss),
        "tokens": len(views.tokens),
        "scored_tokens": len(views.score_row),
        "padded_tokens": sum(draw.noisy.numel() for side in plain.draws for draw in side),
        "peak_mb": rounds[0][1].peak_mb,
        "peak_mb_straightforward": rounds[0][2].peak_mb,
        "sizes": asdict(sizes),
    }


def make_networks(sizes: Sizes) -> tuple[LLaDA, LLaDA]:
    """A reference of random weights and a policy a little away from it, so that margins are not zero."""
    config = Config(
        d_model=sizes.d_model,
        n_layers=sizes.layers,
        n_heads=sizes.heads,
        mlp_hidden_size=3 * sizes.d_model,
        vocab_size=sizes.vocabulary,
        mask_token_id=sizes.vocabulary - 2,
        eos_token_id=sizes.vocabulary - 1,
    )
    generator = torch.Generator().manual_seed(0)
    reference, policy = LLaDA(config).initialize(generator), LLaDA(config)
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * config.init_std * torch.randn(parameter.shape, generator=generator)
    return reference, policy


def make_pairs(sizes: Sizes) -> Pairs:
    """Pairs of random tokens."""
    random = Noise(0).generator("benchmark")
    eos = sizes.vocabulary - 1

    def text() -> np.ndarray:
        length = round(np.exp(random.uniform(np.log(sizes.shortest), np.log(sizes.longest))))
        return random.integers(0, sizes.vocabulary - 2, length).astype(np.int32)

    def response() -> np.ndarray:
        return np.append(text()[:-1], np.int32(eos))

    count = sizes.pairs
    return Pairs(
        row=np.arange(count),
        prompts=[text() for _ in range(count)],
        responses=[(response(), response()) for _ in range(count)],
        rewards=np.tile([1.0, 0.0], (count, 1)),
        mask_id=eos - 1,
        eos_id=eos,
    )


def gradient(network: nn.Module) -> Tensor:
    """float64 [number of weights]."""
    return torch.cat([parameter.grad.double().flatten() for parameter in network.parameters()])


@dataclass(frozen=True)
class Timed:
    """What a call returned, its CPU seconds, and the rise of the peak resident size."""

    result: Any
    seconds: float
    peak_mb: float | None

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> Timed:
        before = _resident_mb(reset=True)
        start = time.process_time()
        result = function(*arguments)
        seconds = time.process_time() - start
        return cls(result, seconds, None if before is None else _resident_mb() - before)


def _resident_mb(reset: bool = False) -> float | None:
    """Peak resident size since the last reset; None where the system keeps none that can be reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default, help=f"{field.default}")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    results = measure(Sizes(**options))
    if as_json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:>28} {value}")
    return int(results["cosine"] < COSINE_LIMIT or results["ratio"] < RATIO_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
