"""What holds at the ends of ranges: nothing to count, a level next to 1, one member, one step, one token alone, blocks of a model."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlhub.advantages import standardised
from rlhub.algorithm.batching import make_batch, sequence_batch, shard_rows
from rlhub.algorithm.compose import Algorithm
from rlhub.algorithm.pairs import Pairs, encode
from rlhub.algorithm.routing import LEVELS, once, router_metrics, router_sums
from rlhub.checkpoints.weights import save_network
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, RouterConfig
from rlhub.errors import RecipeError
from rlhub.likelihoods import by_sign
from rlhub.likelihoods.eubo import upper_bound
from rlhub.models import llada_moe
from rlhub.networks.experts import Routing, Rule
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.objectives import token_mean
from rlhub.parts import load_part, part_names
from rlhub.tasks.preferences import Preference
from rlhub.types import Batch, Credit, LogLikelihood, RewardResult, Rollout, Scores, Views
from rlhub.views import adaptive, all_masks, count_of, coupled, mask_level, mask_ratio, supervised
from rlhub.views._rows import NoisyRow, build_views
from workers.learner import Learner
from workers.sync import SyncError, load_buckets

RECIPES = Path(__file__).parents[2] / "recipes"
PROFILE = Profile(mask_id=0, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="")
BLOCKS = Profile(mask_id=0, eos_id=1, stop_ids=(1,), pad_id=1, lora_targets="", block_length=2)


def batch_of(count: int = 1, length: int = 4, prompt: int = 2, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    prompts, completions = ([random.integers(2, 9, size) for _ in range(count)] for size in (prompt, length))
    return sequence_batch(prompts, completions, range(count))


def views_of(module: Any, options: dict, profile: Profile = PROFILE, **shape: int) -> Views:
    batch = batch_of(**shape)
    credit = Credit(torch.ones(len(batch), dtype=torch.float64), torch.ones(len(batch), dtype=torch.bool))
    return module.make(batch, credit, module.Config(**options), Noise(0).stream("views"), 0, profile)


# ------------------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize("name", ["best_worst", "group_mean", "leave_one_out", "softmax", "z_score"])
def test_one_completion_a_prompt_has_nothing_to_be_compared_with(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name} compares completions of one prompt and needs at least 2"):
        load_recipe(RECIPES / "sort.yaml", [f"algorithm.advantage.name={name}", "algorithm.completions_per_prompt=1"])


def test_one_valid_member_of_a_group_has_advantage_0() -> None:
    assert standardised(np.array([[3.0, np.nan], [1.0, 2.0]]), 0.5)[0, 0] == 0.0


def test_defaults_are_those_of_the_released_code() -> None:
    assert load_part("advantages", "z_score").Config().epsilon == 1e-4  # d1
    assert by_sign.Config().rescale  # SPG


# ----------------------------------------------------------------------------------------------------------------- likelihoods


def test_a_mean_over_no_token_is_0() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    likelihood = LogLikelihood(torch.zeros(2, 2), "exact", "token", torch.tensor([2, 2]), mask=mask)
    assert token_mean(torch.tensor([[5.0, 5.0], [1.0, 2.0]]), likelihood).tolist() == [0.0, 1.5]


def test_the_upper_bound_of_one_covered_token_is_stretched_to_the_length() -> None:
    views = build_views(batch_of(), [NoisyRow(0, 0, np.array([True, False, False, False]), 4.0)], 1, PROFILE)
    log_prob = torch.tensor([-1.5], dtype=torch.float64)
    plain, stretched = (upper_bound(log_prob, views, 2.0, rescale).item() for rescale in (False, True))
    assert stretched == pytest.approx(4 * plain) and plain != 0


# ----------------------------------------------------------------------------------------------------------------------- views


def test_a_level_next_to_1_masks_everything_and_no_more() -> None:
    assert count_of(np.nextafter(1.0, 0.0), 3) == 3


def test_stratified_levels_stay_below_1_and_are_one_stratum_apart() -> None:
    batch = batch_of(count=20)
    for sample in range(len(batch)):
        levels = [mask_level(Noise(0).stream("views"), batch, sample, draw, 4, 0, "stratified") for draw in range(4)]
        assert max(levels) < 1 and np.diff(sorted(levels)) == pytest.approx([0.25] * 3)


def test_masks_along_a_curve_have_the_levels_that_were_asked_for() -> None:
    wide, narrow = (views_of(mask_ratio, {"curve": "linear", "t_min": t_min, "draws": 4}, count=50, length=40) for t_min in (0.0, 0.8))
    shares = [len(views.score_row) / (50 * 4 * 40) for views in (wide, narrow)]
    assert shares[0] == pytest.approx(0.5, abs=0.05) and shares[1] == pytest.approx(0.9, abs=0.03)
    assert set(wide.score_weight.tolist()) == {1.0}
    assert len(set(views_of(mask_ratio, {"curve": "linear", "weight": "elbo", "draws": 4}).score_weight.tolist())) > 1
    with pytest.raises(ValueError, match="weight must be plain or elbo, got 'other'"):
        mask_ratio.Config(weight="other")


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": -0.5}, {"epsilon": 1.0}, {"geometric": 1.0}])
def test_supervised_masks_have_a_chance_between_0_and_1(options: dict) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        supervised.Config(**options)


def test_each_draw_has_a_level_in_its_cell() -> None:
    views = views_of(adaptive, {"draws": 2, "edges": [0.0, 0.75, 1.0]}, count=40, length=8)
    counts = torch.zeros(40, 2).index_put_((views.sample[views.score_row], views.draw[views.score_row]), torch.tensor(1.0), accumulate=True)
    assert counts[:, 0].max() == 6 and counts[:, 0].min() == 1 and set(counts[:, 1].tolist()) == {7.0, 8.0}
    for edges in ([0.1, 1.0], [-0.1, 1.0], [0.0, 0.9], [0.0, 1.1]):
        with pytest.raises(ValueError, match="ascend from 0 to 1"):
            adaptive.Config(draws=1, edges=edges)


@pytest.mark.parametrize("module", [coupled, supervised])
def test_views_of_a_block_causal_model_see_clean_blocks_before(module: Any) -> None:
    views = views_of(module, {"draws": 1}, BLOCKS)
    assert views.layout.attention == "block_diffusion"
    assert views.layout.block_ids.dtype == torch.int32
    assert views.layout.block_ids.tolist() == (views.layout.position_ids // 2).tolist() and int(views.layout.block_ids.max()) == 2


def test_all_masks_of_two_blocks_are_as_many_as_those_of_one() -> None:
    assert views_of(all_masks, {}, BLOCKS).num_rows == 2**2 - 1


def test_a_first_sample_without_rows_is_no_start_of_a_shard() -> None:
    masked = np.ones(4, dtype=bool)
    views = build_views(batch_of(count=3), [NoisyRow(sample, draw, masked) for sample in (1, 2) for draw in (0, 1)], 2, PROFILE)
    assert shard_rows(views, 2) == [(0, 2), (2, 4)]


# --------------------------------------------------------------------------------------------------------------------- batches


class Words:
    """A tokenizer of letters: a is 2, b is 3, and so on."""

    mask_token_id, eos_token_id, unk_token_id, mask_token, unk_token = 0, 1, None, "[MASK]", None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) - 95 for letter in text] for text in texts]}


@pytest.mark.parametrize(("full", "ends"), [(0, [1, 1]), (4, [5, 1])], ids=["data", "rollouts of four tokens"])
def test_a_response_that_fills_the_canvas_has_no_end(full: int, ends: list[int]) -> None:
    pairs, bad = encode([Preference(0, 1, "a", ("bbcd", "bc"), (1.0, 0.0))], Words(), 100, full)
    assert not bad and [int(response[-1]) for response in pairs.responses[0]] == ends
    assert pairs.canvas == 0 and pairs.batch([0]).scored_length.tolist() == list(map(len, pairs.responses[0]))


def test_pairs_are_not_padded_unless_a_canvas_is_named() -> None:
    own = np.array([2, 3, 1], dtype=np.int32)
    pairs = Pairs(np.zeros(1, dtype=np.int64), [own], [(own, own[1:])], np.array([[1.0, 0.0]]), mask_id=0, eos_id=1)
    assert pairs.batch([0]).scored_length.tolist() == [3, 2] and pairs.canvas == 0


def test_grades_of_a_single_step_are_enough() -> None:
    steps, none = np.zeros(2, dtype=np.int16), np.zeros(2, np.float32)
    one = Rollout(0, 0, np.array([2]), np.array([3, 4]), 2, steps, none, none, np.zeros(2, np.int32), 1).graded(RewardResult(1.0))
    batch = make_batch([replace(one, step_rewards=(RewardResult(0.5),))], scored_length="canvas")
    assert batch.step_rewards is not None and batch.step_rewards.tolist() == [[[0.5]]] and batch.rewards.tolist() == [[1.0]]


# ------------------------------------------------------------------------------------------------------------------ objectives


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("scores.policy.value, {}", r"a tensor of shape \[2\]"),
        ("scores.policy.value.sum()", "Tensor"),
        ("1.0, {}", r"\(float, dict\)"),
        ("scores.policy.value.sum(), {}, 0", r"\(Tensor, dict, int\)"),
        ("scores.policy.value.sum(), 3", r"\(Tensor, int\)"),
    ],
)
def test_an_objective_that_returns_something_else_is_told_what(tmp_path: Path, returned: str, shown: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Config:\n    pass\n\n"
        f"def loss(scores, credit, config):\n    return {returned}\n"
    )
    algorithm = Algorithm.compose(AlgorithmConfig(objective={"name": str(file)}))
    value = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scores = Scores(LogLikelihood(value, "lower", "sequence", torch.tensor([1, 1])))
    with pytest.raises(RecipeError, match=rf"must return \(scalar Tensor, dict\), got {shown}"):
        algorithm.loss(scores, Credit(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bool)))


# --------------------------------------------------------------------------------------------------------------------- routers

RULE = Rule(num_experts=4, top_k=1)


def test_a_token_that_is_computed_alone_counts_once() -> None:
    routing = Routing(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), RULE)
    assert [len(one.logits) for one in once([routing, routing], 1, 1)] == [1, 1]
    assert [len(one.experts) for one in once([routing, routing], 2, 2)] == [2, 2]


def test_tokens_of_fully_masked_rows_are_in_the_last_quarter() -> None:
    routing = Routing(torch.zeros(4, 4), torch.arange(4)[:, None], RULE)
    (sums,) = router_sums([routing], torch.tensor([0.0, 0.25, 0.74, 1.0]), torch.arange(4))
    assert sums[: LEVELS * 4].view(LEVELS, 4).nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_statistics_of_routers_name_every_quarter_that_has_tokens() -> None:
    """Expert 3 is never chosen; the third quarter has no tokens in one of the two layers."""
    load = torch.zeros(2, LEVELS, 4, dtype=torch.float64)
    load[:, :, 0], load[:, 1, 1], load[1, 2] = 2.0, 1.0, 0.0
    total = torch.cat([load.flatten(1), torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)], dim=1)
    metrics = router_metrics(total, RULE)
    named = {f"router/level_{quarter}/{what}" for quarter in (1, 2, 4) for what in ("load_max_over_mean", "load_shift")}
    assert {key for key in metrics if "level" in key} == named
    assert metrics["router/level_1/load_max_over_mean"] == 4.0 and metrics["router/level_2/load_max_over_mean"] == pytest.approx(4 * 2 / 3)


# ------------------------------------------------------------------------------------------------------------------- transport


def test_buckets_that_may_not_be_written_are_copied() -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(3)}
    bucket = np.frombuffer(np.arange(5, dtype=np.float32).tobytes(), dtype=np.uint8)
    with warnings.catch_warnings(action="error"):
        load_buckets(state, [bucket], 1 << 20)
    assert state["a"].tolist() == [0.0, 1.0] and state["b"].tolist() == [2.0, 3.0, 4.0]


def test_a_bucket_of_another_size_is_told_by_its_first_and_last_tensor() -> None:
    with pytest.raises(SyncError, match="expected 20 for a to b"):
        load_buckets({"a": torch.zeros(2), "b": torch.zeros(3)}, [np.zeros(8, dtype=np.uint8)], 1 << 20)


class LostMember:
    def __init__(self) -> None:
        self.closed = False

    def broadcast(self, tensor: torch.Tensor) -> None:
        raise RuntimeError("connection closed by peer")

    def close(self) -> None:
        self.closed = True


# -------------------------------------------------------------------------------------------------------------------- learners

ALGORITHM = AlgorithmConfig(views={"name": "elbo", "draws": 2})
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, max_grad_norm=1e9, schedule="constant")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experts") / "model"
    network = llada_moe.build(llada_moe.Config.from_published(llada_moe.TINY)).initialize(torch.Generator().manual_seed(3))
    save_network(network, folder)
    return str(folder)


def learner_on(folder: str, **place: int) -> Learner:
    router = RouterConfig(load_balance=0.1, z=0.01)
    return Learner(folder, LearnerConfig(backend="torch", micro_batch_tokens=60), 0, router=router, **place)


def graded() -> Batch:
    """Three prompts with two completions each: of different lengths, so that two learners have different numbers of micro-batches."""
    random = np.random.default_rng(0)
    rollouts = []
    for uid, length in enumerate([30, 30, 6, 6, 6, 6]):
        steps, none = np.arange(length, dtype=np.int16), np.zeros(length, np.float32)
        tokens = random.integers(0, 12, 3 + length).astype(np.int32)
        one = Rollout(uid, uid // 2, tokens[:3], tokens[3:], length, steps, none, none, np.zeros(length, np.int32), length)
        rollouts.append(one.graded(RewardResult(float(uid % 2))))
    return make_batch(rollouts, scored_length="canvas")


def step(learner: Learner) -> tuple[dict[str, float], torch.Tensor]:
    metrics = learner.step(learner.algorithm.credited(graded()))
    return metrics, torch.cat([parameter.detach().double().flatten() for parameter in learner.network.parameters()])


def test_a_learner_that_lost_a_receiver_has_left_the_group(experts: str) -> None:
    learner = learner_on(experts)
    learner.begin(ALGORITHM, OPTIMIZER, 8)
    learner.member = member = LostMember()
    with pytest.raises(RuntimeError, match="closed by peer"):
        learner.broadcast(1 << 20)
    assert learner.member is None and member.closed


def test_a_learner_alone_leaves_no_group_and_saves_where_no_folder_is(experts: str, tmp_path: Path) -> None:
    learner = learner_on(experts)
    learner.begin(ALGORITHM, OPTIMIZER, 8)
    learner.leave()
    learner.save(str(tmp_path / "run" / "checkpoints"))
    assert (tmp_path / "run" / "checkpoints" / "hf" / "config.json").exists()


def of_two(rank: int, folder: str, address: Any, answers: Any) -> None:
    """One of two learners, whose backend averages gradients over them as DeepSpeed's does."""
    torch.set_num_threads(1)
    learner = learner_on(folder, rank=rank, num_learners=2)
    if rank == 0:
        address.put(learner.rendezvous())
    learner.join(address.get(timeout=60) if rank else f"127.0.0.1:{learner.store.port}")
    learner.begin(ALGORITHM, OPTIMIZER, 8)
    alone = learner.backend.step

    def together() -> tuple[float, float]:
        for parameter in learner.network.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        return alone()

    learner.backend.step = together  # type: ignore[method-assign]
    metrics, weights = step(learner)
    answers.put((rank, metrics, weights.numpy()))
    learner.leave()
    answers.close()
    answers.join_thread()
    os._exit(0)


def test_two_learners_of_a_mixture_of_experts_do_the_step_of_one(experts: str) -> None:
    context = multiprocessing.get_context("fork")
    address, answers = context.Queue(), context.Queue()
    processes = [context.Process(target=of_two, args=(rank, experts, address, answers), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = {rank: (metrics, weights) for rank, metrics, weights in (answers.get(timeout=60) for _ in range(2))}
    finally:
        for process in processes:
            process.kill()
    single = learner_on(experts)
    single.begin(ALGORITHM, OPTIMIZER, 8)
    before = torch.cat([parameter.detach().double().flatten() for parameter in single.network.parameters()])
    metrics, weights = step(single)
    for of_rank, own in found.values():
        assert np.linalg.norm(own - weights.numpy()) <= 1e-3 * (weights - before).norm()
        assert {key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in metrics.items()} == of_rank


def test_every_advantage_is_tried_here_or_needs_grades_of_states() -> None:
    grouped = {name for name in part_names("advantages") if getattr(load_part("advantages", name), "GROUP", False)}
    assert grouped == {"best_worst", "group_mean", "leave_one_out", "softmax", "z_score", "step_difference"}


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out", "softmax", "z_score", "best_worst"])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 12])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-12, 7.7])
def test_equal_rewards_have_no_signal(name: str, size: int, reward: float) -> None:
    batch = sequence_batch([np.array([2])] * size, [np.array([3])] * size, range(size), rewards=np.full((1, size), reward))
    options = {"epsilon": 0.0} if name == "z_score" else {}
    module = load_part("advantages", name)
    assert not module.assign(batch.rewards, batch, module.Config(**options)).advantages.any()
