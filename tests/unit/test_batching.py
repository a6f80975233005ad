"""Batches from graded rollouts, packed views, micro-batches and shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhub.advantages import group_mean, leave_one_out
from rlhub.algorithm.batching import make_batch, micro_batches, shard_rows
from rlhub.networks.layout import pack_layout, slice_layout
from rlhub.networks.profile import Profile
from rlhub.types import Batch, RewardResult, Rollout, Views
from rlhub.views._rows import NoisyRow, build_views

MASK = 9
PROFILE = Profile(mask_id=MASK, eos_id=8, stop_ids=(8,), pad_id=8, lora_targets="")


def rollout(uid: int, group: int, value=1.0, status="ok", completion=(5, 6, 7, 8), length=4, prompt=2) -> Rollout:
    size = len(completion)
    return Rollout(
        uid=uid,
        group_uid=group,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        length=length,
        unmask_step=np.zeros(size, dtype=np.int16),
        logp_sample=np.zeros(size, dtype=np.float32),
        logp_model=np.full(size, -float(uid), dtype=np.float32),
        policy_version=np.zeros(size, dtype=np.int32),
        num_forwards=1,
        reward=RewardResult(value, status),
    )


def batch_of(*rollouts: Rollout, scored_length: str = "canvas", **options) -> Batch:
    return make_batch(rollouts, scored_length=scored_length, **options)


# --------------------------------------------------------------------------------------------------------------------- batch


def test_a_batch_is_in_uid_order():
    batch = batch_of(rollout(12, 7, 0.3), rollout(2, 3, 0.1), rollout(11, 7, 0.2), rollout((1 << 64) - 1, 3, 0.4))
    assert batch.uid.tolist() == [2, 11, 12, (1 << 64) - 1]
    assert batch.group.tolist() == [0, 1, 1, 0] and batch.member.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(batch.rewards, [[0.1, 0.4], [0.2, 0.3]])
    np.testing.assert_array_equal(batch.rewards[batch.group, batch.member], [0.1, 0.2, 0.3, 0.4])
    assert [row[0] for row in batch.logp_model] == [-2.0, -11.0, -12.0, -float((1 << 64) - 1)]
    assert batch.valid.all()


def test_span_is_the_canvas_or_the_response():
    rollouts = [rollout(0, 0, length=2), rollout(1, 0, length=4)]
    assert batch_of(*rollouts).scored_length.tolist() == [4, 4]
    assert batch_of(*rollouts, scored_length="response").scored_length.tolist() == [2, 4]
    with pytest.raises(ValueError, match="canvas or response"):
        batch_of(*rollouts, scored_length="prompt")


def test_groups_of_unequal_size_leave_nan():
    batch = batch_of(rollout(0, 0, 1.0), rollout(1, 0, 0.0), rollout(2, 1, 0.5))
    np.testing.assert_array_equal(batch.rewards, [[1.0, 0.0], [0.5, np.nan]])
    assert batch.valid.all()


def failing() -> list[Rollout]:
    """Two groups; a timeout in the first one, an answer that could not be parsed in the second one."""
    first = [rollout(0, 0, 1.0), rollout(1, 0, 0.7, "timeout"), rollout(2, 0, 0.0)]
    return [*first, rollout(3, 1, 0.1, "unparsed"), rollout(4, 1, 0.5), rollout(5, 1, 0.5)]


@pytest.mark.parametrize(
    ("policy", "rewards"),
    [
        ("drop_sample", [[1.0, np.nan, 0.0], [0.1, 0.5, 0.5]]),
        ("drop_group", [[np.nan, np.nan, np.nan], [0.1, 0.5, 0.5]]),
        ("value:-0.25", [[1.0, -0.25, 0.0], [0.1, 0.5, 0.5]]),
    ],
)
def test_invalid_grades(policy, rewards):
    """An unparsed answer keeps its grade, a failure of the grader never counts as it stands."""
    batch = batch_of(*failing(), on_invalid=policy)
    np.testing.assert_array_equal(batch.rewards, rewards)
    np.testing.assert_array_equal(batch.valid, ~np.isnan(np.ravel(rewards)))


def test_invalid_samples_get_no_advantage_and_do_not_move_others():
    batch = batch_of(*failing())
    credit = group_mean.assign(batch.rewards, batch, group_mean.Config())
    np.testing.assert_allclose(credit.advantages, [0.5, 0.0, -0.5, 0.1 - 1.1 / 3, 0.5 - 1.1 / 3, 0.5 - 1.1 / 3])
    assert credit.valid.tolist() == [True, False, True, True, True, True]
    others = leave_one_out.assign(batch.rewards, batch, leave_one_out.Config()).advantages
    np.testing.assert_allclose(others, [1.0, 0.0, -1.0, 0.1 - 0.5, 0.5 - 0.3, 0.5 - 0.3])
    lonely = batch_of(rollout(0, 0, 1.0), rollout(1, 0, 0.0, "crashed"))
    credit = group_mean.assign(lonely.rewards, lonely, group_mean.Config())
    assert credit.advantages.tolist() == [0.0, 0.0] and credit.valid.tolist() == [True, False]


def test_ungraded_rollouts_and_unknown_policies_are_refused():
    bare = rollout(3, 0)
    object.__setattr__(bare, "reward", None)
    with pytest.raises(ValueError, match="rollout 3 has no grade"):
        batch_of(bare)
    with pytest.raises(ValueError, match="on_invalid must be"):
        batch_of(*failing(), on_invalid="zero")


# --------------------------------------------------------------------------------------------------------------------- views


def views_of(lengths: list[int], rows_per_sample: list[int], prompt: int = 2) -> Views:
    """Views whose sample b has `rows_per_sample[b]` rows of `prompt + lengths[b]` tokens, every other position scored."""
    batch = batch_of(*(rollout(uid, 0, completion=range(10, 10 + size), length=size, prompt=prompt) for uid, size in enumerate(lengths)))
    rows = [
        NoisyRow(sample, draw, (np.arange(lengths[sample]) + draw) % 2 == 0, weight=1.0 + draw)
        for sample, count in enumerate(rows_per_sample)
        for draw in range(count)
    ]
    return build_views(batch, rows, max(rows_per_sample), PROFILE)


def test_views_hide_what_they_score():
    batch = batch_of(rollout(0, 0, completion=(5, 6, 7), length=3, prompt=1), rollout(1, 0, completion=(8, 4), length=2, prompt=2))
    masked = [np.array([True, False, True]), np.array([False, True])]
    rows = [
        NoisyRow(0, 0, masked[0], weight=1.5),
        NoisyRow(1, 0, masked[1], weight=np.array([0.25, 0.5]), scored=np.array([True, True]), prompt_masked=np.array([True, False])),
    ]
    views = build_views(batch, rows, 1, PROFILE)
    assert views.tokens.tolist() == [0, MASK, 6, MASK, MASK, 1, 8, MASK]
    assert views.layout.row_offsets.tolist() == [0, 4, 8]
    assert views.layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert views.target_rows.tolist() == [1, 3, 6, 7]
    assert views.score_target.tolist() == [5, 7, 8, 4]
    assert views.score_weight.tolist() == [1.5, 1.5, 0.25, 0.5]
    assert views.score_token.tolist() == [0, 2, 0, 1] and views.score_sample.tolist() == [0, 0, 1, 1]
    assert views.step is None and views.scored_length.tolist() == [3, 2] and views.canvas_length == 3


def test_a_slice_of_a_layout_stands_alone():
    layout = pack_layout([3, 1, 4])
    part = slice_layout(layout, 1, 3)
    alone = pack_layout([1, 4])
    for name in ("position_ids", "segment_ids", "block_ids", "row_offsets"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_micro_batches_cover_every_row_and_score_once(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    rows_per_sample = [data.draw(st.integers(1, 3)) for _ in lengths]
    max_tokens = data.draw(st.integers(1, 40))
    views = views_of(lengths, rows_per_sample)
    first = data.draw(st.integers(0, views.num_rows))
    last = data.draw(st.integers(first, views.num_rows))
    runs = micro_batches(views, max_tokens, first, last)
    assert [row for run in runs for row in range(run.first_row, run.last_row)] == list(range(first, last))
    sizes = views.layout.lengths
    tokens = [int(sizes[run.first_row : run.last_row].sum()) for run in runs]
    for run, size in zip(runs, tokens, strict=True):
        assert run.last_row > run.first_row
        assert size <= max_tokens or run.last_row - run.first_row == 1
        rows = views.score_row[run.first_score : run.last_score]
        assert ((rows >= run.first_row) & (rows < run.last_row)).all()
    for size, following in zip(tokens, runs[1:], strict=False):
        assert size + int(sizes[following.first_row]) > max_tokens, "the next row would have fitted"
    wanted = ((views.score_row >= first) & (views.score_row < last)).nonzero().flatten().tolist()
    assert [score for run in runs for score in range(run.first_score, run.last_score)] == wanted


def test_rows_without_scores_are_kept():
    batch = batch_of(rollout(0, 0), rollout(1, 0))
    nothing = np.zeros(4, dtype=bool)
    views = build_views(batch, [NoisyRow(0, 0, ~nothing), NoisyRow(1, 0, ~nothing, scored=nothing)], 1, PROFILE)
    assert [(run.first_score, run.last_score) for run in micro_batches(views, 6)] == [(0, 4), (4, 4)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_shards_hold_whole_samples_and_all_of_them(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=10))
    rows_per_sample = [data.draw(st.integers(1, 4)) for _ in lengths]
    num_shards = data.draw(st.integers(1, min(4, len(lengths))))
    views = views_of(lengths, rows_per_sample)
    shards = shard_rows(views, num_shards)
    assert len(shards) == num_shards
    assert [row for first, last in shards for row in range(first, last)] == list(range(views.num_rows))
    owners = [set(views.sample[first:last].tolist()) for first, last in shards]
    assert all(owners), "a learner has nothing to do"
    assert sum(len(owned) for owned in owners) == len(lengths), "a sample lies on two learners"


def test_shards_are_even():
    views = views_of([10] * 12, [2] * 12)
    assert shard_rows(views, 3) == [(0, 8), (8, 16), (16, 24)]
    uneven = views_of([40, 5, 5, 5, 5, 5, 5, 5, 5], [1] * 9, prompt=0)
    assert shard_rows(uneven, 2) == [(0, 1), (1, 9)]
    for lengths in ([90, 1, 1], [1, 1, 90]):
        assert shard_rows(views_of(lengths, [1] * 3), 3) == [(0, 1), (1, 2), (2, 3)], "every learner gets a sample"


def test_more_learners_than_samples_are_refused():
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 learners"):
        shard_rows(views_of([4, 4], [3, 3]), 3)
