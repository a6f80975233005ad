"""The learner: gradient steps of any algorithm, checkpoints and the publication of weights.

It knows no algorithm: a step evaluates the token log-probs of views, asks the algorithm for the derivative of its loss with respect to
each of them, and back-propagates that. When the views of a rank fit one micro-batch the first forward keeps its graph; otherwise a
second pass recomputes one micro-batch at a time. Both are exact for every objective, with memory constant in the number of draws.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhub.algorithm.batching import MicroBatch, micro_batches, shard_rows
from rlhub.algorithm.compose import Algorithm, CreditedBatch, LogProbs
from rlhub.algorithm.health import health_metrics
from rlhub.algorithm.replay import choose_states, gap_metrics, recorded, replay_views, replayed_log_probs
from rlhub.algorithm.routing import auxiliary_loss, freeze_routers, masked_share, once, router_metrics, router_sums
from rlhub.algorithm.scoring import micro_batch_log_probs
from rlhub.checkpoints.weights import load_network, save_network
from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, RouterConfig
from rlhub.errors import RecipeError
from rlhub.networks.decoder import Decoder
from rlhub.networks.experts import Routing, record_routing, routers
from rlhub.networks.lora import adapters_off, has_adapters, training_state
from rlhub.noise import Noise
from rlhub.types import LogLikelihood, Receipt, Rollout, Scores, Views
from workers.sync import buckets_of, receipt_of
from workers.weight_group import GroupMember, open_store, send_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Reference = Mapping[int, Tensor | LogLikelihood]  # log-probs [M], or ready estimates, by index of the views
Routes = dict[MicroBatch, list[Tensor]]  # experts [T, K] of each layer in the forward of a micro-batch


class Learner(GroupMember):
    """One rank of the learners.

    Args:
        model_path: model folder to start from.
        rank, num_learners: place among the learners; `join` must follow when there are several, and always with DeepSpeed.
    """

    def __init__(
        self,
        model_path: str,
        config: LearnerConfig,
        run_seed: int,
        *,
        rank: int = 0,
        num_learners: int = 1,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        threads: int | None = None,
        router: RouterConfig | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.config, self.rank, self.num_learners, self.device = config, rank, num_learners, torch.device(device)
        self.router = router or RouterConfig()
        self.noise = Noise(run_seed)
        self.dtype, self.attention = getattr(torch, dtype), attention
        self.network = self._load(model_path)
        self.algorithm: Algorithm  # from `begin` on

    def rendezvous(self) -> str:
        """Open the place at which the learners meet, `host:port` on this machine; asked of rank 0."""
        self.store = open_store(self.num_learners)
        return f"{self.store.host}:{self.store.port}"

    def join(self, address: str) -> None:
        """Enter the learners' process group; every rank must call this."""
        host, port = address.rsplit(":", 1)
        if self.rank > 0:
            self.store = dist.TCPStore(host, int(port), self.num_learners, wait_for_workers=False)
        # DeepSpeed reads these even when the group exists already; Ray narrows the visible devices, so each rank's device is number 0.
        os.environ |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.num_learners), "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.num_learners,
            timeout=timedelta(minutes=10),
        )

    def leave(self) -> None:
        """Leave the process group, which is global to the process."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def begin(self, algorithm: AlgorithmConfig, optimizer: OptimizerConfig, total_updates: int, model_path: str | None = None) -> None:
        """Start a phase: compose its algorithm and build a fresh optimizer over `total_updates` optimizer steps."""
        self.algorithm = Algorithm.compose(algorithm)
        if model_path is not None:
            # Not into the old parameters: the engine of the phase before has hooks on them.
            self.network = self._load(model_path)
        if algorithm.reference == "adapter_off" and not has_adapters(self.network):
            raise RecipeError("algorithm.reference: adapter_off needs an adapter, and all weights are trained; set model.lora.rank")
        backend = importlib.import_module(f"workers.backends.{self.config.backend}_backend")
        self.backend = backend.Backend(self.network, optimizer, total_updates, self.config)

    def _load(self, model_path: str) -> Decoder:
        network = load_network(Path(model_path), self.dtype, self.device, merge_adapter=False)
        network.attention = self.attention
        if self.router.freeze:
            freeze_routers(network)
        return network

    def make_views(self, credited: CreditedBatch) -> list[Views]:
        """The views of every inner update of a batch; views that do not change between updates are made once."""
        batch, credit, profile = credited.batch, credited.credit, self.network.profile
        return [self.algorithm.make_views(batch, credit, self.noise, update, profile) for update in range(self.algorithm.num_views)]

    def estimate(self, algorithm: AlgorithmConfig, credited: CreditedBatch, base: bool = False) -> LogLikelihood:
        """The policy's estimate for a batch under the first views of an algorithm, which need not be the one that is trained.

        Args:
            base: of the base without the adapter instead.
        """
        parts = Algorithm.compose(algorithm)
        views = parts.make_views(credited.batch, credited.credit, self.noise, 0, self.network.profile)
        with adapters_off(self.network) if base else nullcontext():
            return parts.estimate(self._all_log_probs(views), views, credited.credit)

    def step(self, credited: CreditedBatch, views: list[Views] | None = None, *reference: Reference) -> dict[str, float]:
        """All inner updates on one batch.

        Args:
            views: what `make_views` returned; made here when None.
            reference: what the reference says of the views, in any number of parts.

        Returns:
            Metrics of the last update, with the gradient norm averaged over updates.
        """
        views = self.make_views(credited) if views is None else views
        references = {index: log_prob for part in reference for index, log_prob in part.items()}
        updates = self.algorithm.config.updates
        which = [update if len(views) > 1 else 0 for update in range(updates)]
        if self.algorithm.needs_reference and self.algorithm.config.reference == "adapter_off":
            references = {index: self._base_reference(credited, views, index) for index in range(len(views))}
        proximal: dict[int, Tensor] = {}
        replay = self.router.replay and bool(routers(self.network))
        routes: dict[int, Routes] = {}
        if self.algorithm.needs_proximal or replay:
            # The first update's proximal policy is the policy itself, unless later updates look through the same views.
            for index in sorted({index for update, index in enumerate(which) if update > 0}):
                routes[index] = {}
                log_prob = self._all_log_probs(views[index], routes[index] if replay else None)
                if self.algorithm.needs_proximal:
                    proximal[index] = log_prob
        norms = []
        for update, index in enumerate(which):
            fixed, chosen = (proximal.get(index), routes.get(index)) if update > 0 else (None, None)
            scores, metrics = self._update(credited, views[index], fixed, references.get(index), chosen)
            norm, learning_rate = self.backend.step()
            norms.append(norm)
        metrics |= health_metrics(self.algorithm, scores, credited.credit, credited.batch)
        return metrics | {"grad_norm": float(np.mean(norms)), "learning_rate": learning_rate}

    @torch.no_grad()
    def replay_check(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """How far the log-probs that rollouts recorded are from those of the weights held now; see `rlhub.algorithm.replay`.

        Every rank computes all of them: there may be fewer rollouts than learners.
        """
        states = choose_states(rollouts, self.noise)
        views = replay_views(states, self.network)
        made = []
        for run in micro_batches(views, self.config.micro_batch_tokens):
            made.append(self.backend.forward(partial(replayed_log_probs, views=views, run=run, states=states, device=self.device)).cpu())
        return gap_metrics(torch.cat(made), recorded(states))

    def _base_reference(self, credited: CreditedBatch, views: list[Views], index: int) -> Tensor | LogLikelihood:
        """What the base without the adapter says, through the policy's noise or its own."""
        with adapters_off(self.network):
            if self.algorithm.config.shared_noise:
                return self._all_log_probs(views[index])
            batch, credit, profile = credited.batch, credited.credit, self.network.profile
            own = self.algorithm.make_views(batch, credit, self.noise, index, profile, self.algorithm.reference_noise)
            return self.algorithm.estimate(self._all_log_probs(own), own, credit)

    def _update(
        self,
        credited: CreditedBatch,
        views: Views,
        proximal: Tensor | None,
        reference: Tensor | LogLikelihood | None,
        routes: Routes | None = None,
    ) -> tuple[Scores, dict[str, float]]:
        """Accumulate the gradient of one update."""
        turns = self._turns(views)
        single = len(turns) == 1
        kept: list[tuple[Tensor, list[Routing], bool]] = []
        total: Tensor | None = None
        with torch.set_grad_enabled(single):
            for run, counts in turns:
                log_prob, record = self._forward(views, run, routes)
                if record:
                    sums = self._router_sums(views, run, record) * counts
                    total = sums if total is None else total + sums
                kept.append((log_prob, record if single else [], counts))
        own = torch.cat([log_prob.detach() for log_prob, _, counts in kept if counts]).cpu()
        log_probs = LogProbs(self._gather(own), proximal, reference)
        coefficient, scores, metrics = self.algorithm.coefficients(log_probs, views, credited.batch, credited.credit)
        # DeepSpeed averages over ranks while the loss is already the mean over the global batch.
        coefficient = coefficient.float() * self.num_learners
        if total is not None and self.num_learners > 1:
            dist.all_reduce(total)
        balanced = not self.router.freeze and any(router.weight.requires_grad for router in routers(self.network))
        for run, counts in turns:
            log_prob, record, _ = kept[0] if single else (*self._forward(views, run, routes), counts)
            part = coefficient[run.first_score : run.last_score].to(self.device)
            loss = (log_prob * part).sum()
            if record and balanced and total is not None:
                loss = loss + auxiliary_loss(record, total, self.router) * self.num_learners
            self.backend.backward(loss * float(counts))
        if total is not None and self.router.statistics:
            metrics |= router_metrics(total.cpu(), routers(self.network)[0].rule)
        return scores, metrics

    def _forward(self, views: Views, run: MicroBatch, routes: Routes | None) -> tuple[Tensor, list[Routing]]:
        """Log-probs of a micro-batch and what the routers did, replaying the routes that are given."""
        with record_routing(self.network, (routes or {}).get(run, ())) as record:
            log_prob = self._log_probs(views, run)
        num_tokens = int(views.layout.row_offsets[run.last_row] - views.layout.row_offsets[run.first_row])
        return log_prob, once(record, num_tokens, run.last_score - run.first_score) if record else record

    def _router_sums(self, views: Views, run: MicroBatch, record: list[Routing]) -> Tensor:
        offsets = views.layout.row_offsets[run.first_row : run.last_row + 1].long()
        tokens = views.tokens[offsets[0] : offsets[-1]]
        targets = views.target_rows[run.first_score : run.last_score] - offsets[0]
        level = masked_share(tokens, offsets, self.network.mask_id)
        return router_sums(record, level.to(self.device), targets.to(self.device))

    def _log_probs(self, views: Views, run: MicroBatch) -> Tensor:
        log_prob: Tensor = self.backend.forward(lambda network: micro_batch_log_probs(network, views, run, self.device))
        return log_prob

    @torch.no_grad()
    def _all_log_probs(self, views: Views, routes: Routes | None = None) -> Tensor:
        """Log-probs [M] of all views, on every rank; the experts that were chosen on the way go into `routes`."""
        made = []
        for run, counts in self._turns(views):
            log_prob, record = self._forward(views, run, None)
            made.append((log_prob.cpu(), counts))
            if routes is not None:
                routes[run] = [routing.experts.to("cpu", torch.int16) for routing in record]
        return self._gather(torch.cat([log_prob for log_prob, counts in made if counts]))

    def _turns(self, views: Views) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, and whether each counts.

        Ranks must make the same number of forward and backward calls, so those with fewer repeat their last one, which does not count.
        """
        first_row, last_row = shard_rows(views, self.num_learners)[self.rank]
        runs = micro_batches(views, self.config.micro_batch_tokens, first_row, last_row)
        return [(runs[min(number, len(runs) - 1)], number < len(runs)) for number in range(self._max_over_ranks(len(runs)))]

    def _gather(self, own: Tensor) -> Tensor:
        """Concatenate each rank's log-probs; shards are consecutive, so this is the order of the views."""
        if self.num_learners == 1:
            return own
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.num_learners)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=self.device))
        widest = max(int(size) for size in sizes)
        padded = torch.zeros(widest, device=self.device)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.num_learners)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).cpu()

    def _max_over_ranks(self, count: int) -> int:
        if self.num_learners == 1:
            return count
        value = torch.tensor([count], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def publish(self, bucket_bytes: int) -> Iterator[np.ndarray]:
        """Yield the weights as flat byte buckets; the other ranks run `gather_only` meanwhile."""
        with self.backend.full_parameters(trained_only=True):
            yield from buckets_of(training_state(self.network), bucket_bytes)

    def broadcast(self, bucket_bytes: int) -> None:
        """Send the weights to the other members of the weight group; the other ranks run `gather_only` meanwhile.

        Raises:
            RuntimeError: a member was lost; this side has left the group.
        """
        assert self.member is not None, "`join_weights` comes first"
        try:
            with self.backend.full_parameters(trained_only=True):
                send_state(self.member, training_state(self.network), bucket_bytes)
        except RuntimeError:
            self.leave_weights()
            raise

    def gather_only(self, bucket_bytes: int) -> None:
        """Take part in the gathering of ZeRO-3 parameters, which is collective, without publishing."""
        with self.backend.full_parameters(trained_only=True):
            pass

    def receipt(self, version: int, bucket_bytes: int) -> Receipt:
        """What a receiver of these weights must hold."""
        with self.backend.full_parameters():
            return receipt_of(self.network, version, bucket_bytes)

    def save(self, folder: str, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        """Write the optimizer state, and on rank 0 the weights in the Hugging Face layout under `hf`."""
        target = Path(folder)
        (target / "learner").mkdir(parents=True, exist_ok=True)
        self.backend.save(target / "learner")
        with self.backend.full_parameters(trained_only=True):
            if self.rank == 0:
                save_network(self.network, target / "hf", tokenizer)

    def load(self, folder: str) -> None:
        """Continue from what `save` wrote; `begin` must have been called with the same arguments as then."""
        self.backend.load(Path(folder) / "learner")
