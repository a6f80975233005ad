"""Training on preference pairs: batches, exact gradients, shared noise, the reference's cache, resume, and pairs made by a policy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_files import DATA, needs_data
from helpers import rows, silent
from safetensors.torch import load_file

from rlhub.algorithm.batching import micro_batches
from rlhub.algorithm.compose import Algorithm, LogProbs
from rlhub.algorithm.pairs import Pairs
from rlhub.algorithm.scoring import micro_batch_log_probs, token_log_probs
from rlhub.checkpoints.weights import load_network
from rlhub.config.recipe import load_recipe
from rlhub.config.schema import Recipe
from rlhub.errors import DataError, RecipeError
from rlhub.networks.profile import Profile
from rlhub.noise import Noise
from rlhub.records.metrics import read_metrics
from rlhub.training.pair_sampling import best_and_worst, sample_pairs
from rlhub.training.run import train

RECIPES = Path(__file__).parents[2] / "recipes"
HH = DATA / "hh-rlhf" / "harmless-base.test.jsonl.gz"

TINY_PAIRS = """
extends: [ALGORITHM]
run: {name: tiny, steps: 6, phases: [pairs], eval_every: 3, checkpoint_every: 2, keep_checkpoints: 9, runtime: local}
model: {config: {d_model: 32, n_layers: 2, n_heads: 2, mlp_hidden_size: 64, max_sequence_length: 32}}
task: {name: sort, train: {digits: 4}, reward: {name: none}}
sampler: {length: 8, steps: 4, block_length: 4}
roles: {generators: 0, reward_workers: 0}
algorithm: {prompts_per_step: 8}
pairs: {data: {path: DATA, held_out_one_in: 4}, eval_rows: 8, noise_plans: 2}
learner: {backend: torch, micro_batch_tokens: 256, optimizer: {learning_rate: 1.0e-3, warmup_steps: 0}}
"""


pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """`make(folder, "key=value", algorithm="vrpo")`: a recipe on 24 pairs of digit rows of different lengths."""
    home = tmp_path_factory.mktemp("recipe")

    def recipe(folder: Path, *overrides: str, algorithm: str = "vrpo", rows: list[dict] | None = None) -> Recipe:
        folder.mkdir(parents=True, exist_ok=True)
        data = home / "pairs.jsonl" if rows is None else folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in (digit_pairs() if rows is None else rows)))
        file = home / f"{algorithm}.yaml"
        text = TINY_PAIRS.replace("ALGORITHM", str(RECIPES / "algorithms" / f"{algorithm}.yaml")).replace("DATA", str(home / "pairs.jsonl"))
        file.write_text(text)
        return load_recipe(file, [f"run.output_dir={folder}", f"pairs.data.path={data}", *overrides])

    return recipe


def digit_pairs(count: int = 32) -> list[dict]:
    """The chosen response counts up, the rejected one down; lengths from 1 to 7."""
    rows = []
    for number in range(count):
        length = 1 + number % 7
        up = [(number + step) % 10 for step in range(length)]
        text = " ".join(map(str, up))
        rows.append({"prompt": f"{number % 10} {number // 10}", "chosen": text, "rejected": " ".join(map(str, [*up[::-1], 3]))})
    return rows


def final_weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"pairs_step_{step:05d}" / "hf" / "model.safetensors")


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(make, tmp_path_factory) -> Path:
    return train(make(tmp_path_factory.mktemp("finished")), silent())


# ------------------------------------------------------------------------------------------------------------------ the run


def test_the_schedule_counts_inner_updates(make, tmp_path):
    run = train(make(tmp_path, "run.steps=2", "algorithm.updates=3", "run.eval_every=9"), silent())
    rates = [row["learning_rate"] for row in rows(run) if row["step"]]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * update / 6)) / 2 for update in (2, 5)]), "VRPO's is a cosine"


def test_a_run_learns_to_prefer_the_chosen_responses(finished):
    written = rows(finished)
    assert [(row["phase"], row["step"]) for row in written] == [("pairs", step) for step in range(7)]
    assert written[0]["eval/pair_accuracy"] == 0.5 and written[0]["eval/pair_margin"] == 0.0  # the policy is the reference
    assert written[6]["eval/pair_margin"] > 0 and written[6]["eval/pair_accuracy"] > 0.5
    assert {"eval/chosen_elbo_per_token", "eval/rejected_elbo_per_token", "data/bad_pairs", "data/pairs"} <= set(written[3])
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [f"pairs_step_0000{step}" for step in (2, 4, 6)]


@pytest.mark.parametrize("overrides", [(), ("pairs.reference_cache=none",)], ids=["cached", "live"])
def test_at_the_reference_the_score_is_zero_bit_for_bit(make, tmp_path, overrides):
    run = train(make(tmp_path, "run.steps=1", "algorithm.auxiliary=[]", *overrides), silent())
    first = rows(run)[1]
    assert first["loss"] == math.log(2) and first["dpo/margin"] == 0.0 and first["elbo/standard_error"] == 0.0


def test_without_sharing_the_score_is_noise(make, tmp_path):
    run = train(make(tmp_path, "run.steps=1", algorithm="dpo"), silent())
    assert rows(run)[1]["dpo/margin"] != 0.0


def test_cached_and_live_references_train_the_same_model(make, finished, tmp_path):
    live = train(make(tmp_path, "pairs.reference_cache=none"), silent())
    assert rows(live) == rows(finished)
    assert same_weights(final_weights(live), final_weights(finished))


def test_the_cache_serves_later_epochs_and_runs(make, finished, tmp_path):
    steps = read_metrics(finished / "metrics.jsonl")[1:]
    sequences = sum(row["num_samples"] for row in steps)
    assert sum(row["system/reference_cache_computed"] for row in steps) == sequences  # computed by this run, each read from disk
    shutil.copytree(finished.parent / "reference_cache", tmp_path / "reference_cache")
    again = train(make(tmp_path, "run.name=again", "algorithm.objective.beta=0.5"), silent())
    assert sum(row["system/reference_cache_hits"] for row in read_metrics(again / "metrics.jsonl")[1:]) == sequences
    assert {row["data/epoch"] for row in read_metrics(again / "metrics.jsonl")[1:]} == {0, 1}


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_killed_run_ends_as_if_it_never_was(make, finished, tmp_path, checkpoint):
    killed = Path(shutil.copytree(finished, tmp_path / "tiny"))
    for step in (2, 4, 6):
        if step > checkpoint:
            (killed / "checkpoints" / f"pairs_step_{step:05d}" / "manifest.json").unlink()
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[:-1]) + '\n{"phase": "pa')
    assert train(make(tmp_path), silent()) == killed
    assert rows(killed) == rows(finished)
    assert same_weights(final_weights(killed), final_weights(finished))


def test_sft_on_the_chosen_responses_comes_first(make, tmp_path):
    rows_of_text = [{"prompt": f"say {number}", "chosen": "yes, gladly " * (1 + number % 3), "rejected": "no"} for number in range(40)]
    recipe = make(
        tmp_path,
        "task.name=preferences",
        f"task.train={{path: {tmp_path}/pairs.jsonl, vocabulary: 256, held_out_one_in: 4}}",
        "run.phases=[sft, pairs]",
        "run.steps=2",
        "sft={steps: 6, batch_size: 16, eval_every: 6}",
        "model.config.max_sequence_length=64",
        rows=rows_of_text,
    )
    run = train(recipe, silent())
    sft = [row for row in rows(run) if row["phase"] == "sft"]
    assert sft[6]["eval/chosen_elbo_per_token"] > sft[0]["eval/chosen_elbo_per_token"] and "eval/pair_accuracy" not in sft[6]
    assert (run / "checkpoints" / "pairs_step_00002").is_dir()


@pytest.mark.parametrize("objective", ["ipo", "simpo"])
def test_other_pair_objectives_train_through_the_same_loop(make, tmp_path, objective):
    overrides = [f"algorithm.objective={{name: {objective}}}", "run.steps=2"]
    if objective == "simpo":
        overrides += ["algorithm.reference=none", "roles.scorers=0"]
    run = train(make(tmp_path, *overrides), silent())
    assert all(math.isfinite(row["loss"]) for row in rows(run)[1:]) and "eval/pair_accuracy" in rows(run)[-1]


def test_unpaired_data_trains_kto(make, tmp_path):
    data = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in digit_pairs(20)
        for name in ("chosen", "rejected")
    ]
    overrides = ("algorithm.advantage={name: labels}", "algorithm.objective={name: kto}", "run.steps=4")
    run = train(make(tmp_path, *overrides, rows=data), silent())
    written = rows(run)
    assert written[1]["num_samples"] in (7, 8) and written[1]["kto/labelled"] == written[1]["num_samples"]
    assert written[-1]["eval/chosen_elbo_per_token"] > written[0]["eval/chosen_elbo_per_token"]


def test_a_reference_that_follows_the_policy(make, tmp_path):
    run = train(make(tmp_path, "algorithm.reference=sync_every:3", "algorithm.auxiliary=[]"), silent())
    written = rows(run)
    assert written[3]["dpo/margin"] != 0.0
    assert written[4]["loss"] == math.log(2)  # the reference has just become the policy
    assert not (tmp_path / "reference_cache").exists()


# ----------------------------------------------------------------------------------------------------------------- bad rows


BAD = [{"prompt": "1 2", "chosen": "3", "rejected": "3"}, {"prompt": "1", "chosen": " ".join("1" * 40), "rejected": "2"}]


def test_bad_pairs_are_counted_and_reported_by_row(make, tmp_path):
    console = silent()
    run = train(make(tmp_path, "run.steps=1", rows=[*digit_pairs()[:20], *BAD]), console)
    reported = [json.loads(line) for line in (run / "bad_pairs.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in reported] == [21, 22]
    assert (
        reported[0]["reason"] == "chosen equals rejected"
        and "42 tokens" in reported[1]["reason"]
        and "limit is 32" in reported[1]["reason"]
    )
    assert "2 of 22 preference rows cannot be used" in console.file.getvalue()
    assert rows(run)[0]["data/bad_pairs"] == 2


def test_the_recipe_may_refuse_bad_pairs(make, tmp_path):
    with pytest.raises(DataError, match=r"row 21: chosen equals rejected \(2 such rows\); mend the data, or set pairs\.on_bad_pair=skip"):
        train(make(tmp_path, "pairs.on_bad_pair=error", rows=[*digit_pairs()[:20], *BAD]), silent())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.on_bad_pair=ignore", r"pairs\.on_bad_pair: no such choice 'ignore'"),
        ("algorithm.behavior=rollout", r"algorithm\.behavior: rollout needs the log-probs of a sampler"),
        ("algorithm.views={name: trajectory}", r"algorithm\.views\.name: trajectory replays a sampler"),
        ("algorithm.auxiliary=[{name: sft}]", r"algorithm\.auxiliary: .*lacks weight"),
        ("algorithm.auxiliary=[{name: sft, weight: 0.1, on: best}]", r"no such choice 'best'"),
        ("algorithm.auxiliary=[{name: stf, weight: 0.1}]", r"did you mean sft"),
        ("roles.generators=1", r"roles\.generators: nothing is generated"),
        ("roles.scorers=0", r"roles\.scorers: 0 scorers"),
        ("run.phases=[online, pairs]", r"run\.phases: expected \[sft\].*got \['online', 'pairs'\]"),
    ],
)
def test_recipes_that_cannot_work_say_why(make, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        make(tmp_path, override)


def test_pairs_need_data():
    with pytest.raises(RecipeError, match=r"pairs\.data: the phase pairs needs data, and task sort brings none"):
        load_recipe(RECIPES / "algorithms" / "vrpo.yaml", ["run.phases=[pairs]"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.reference=sync_every:4", "follows the policy cannot be cached"),
        ("algorithm.fresh_views=step", "never repeats its noise"),
    ],
)
def test_a_cache_that_was_asked_for_must_be_possible(make, tmp_path, override, message):
    with pytest.raises(RecipeError, match=message):
        make(tmp_path, override, "pairs.reference_cache=somewhere")


# ---------------------------------------------------------------------------------------------------- batches and gradients


def uneven() -> Pairs:
    """Pairs of very different length."""
    generator = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return generator.integers(0, 10, length).astype(np.int32)

    lengths = [(1, 12), (9, 2), (3, 3), (14, 1), (1, 1)]
    return Pairs(
        row=np.array([7, 3, 11, 200, 5]),
        prompts=[tokens(length) for length in (2, 9, 1, 4, 12)],
        responses=[(tokens(a), tokens(b)) for a, b in lengths],
        rewards=np.tile([1.0, 0.0], (5, 1)),
        mask_id=10,
        eos_id=11,
    )


@pytest.fixture(scope="module")
def network(finished) -> torch.nn.Module:
    return load_network(finished / "checkpoints" / "pairs_step_00006" / "hf")


def vrpo(*overrides: str) -> Algorithm:
    return Algorithm.compose(load_recipe(RECIPES / "algorithms" / "vrpo.yaml", list(overrides)).algorithm)


def test_a_pair_is_a_group_of_two_and_its_noise_belongs_to_its_row():
    pairs, algorithm = uneven(), vrpo()
    whole, part = pairs.batch([0, 1, 2, 3], epoch=1), pairs.batch([3, 1], epoch=1)
    assert algorithm.credit(whole).pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert set(part.uid) < set(whole.uid) and part.response_length.tolist() == [9, 2, 14, 1]
    profile = Profile(mask_id=10, eos_id=11, stop_ids=(11,), pad_id=11, lora_targets="")
    views = [algorithm.make_views(batch, algorithm.credit(batch), Noise(0), 0, profile) for batch in (whole, part)]
    rows_of = [
        {
            (int(batch.uid[view.sample[row]]), int(view.draw[row])): view.tokens[
                view.layout.row_offsets[row] : view.layout.row_offsets[row + 1]
            ]
            for row in range(view.num_rows)
        }
        for view, batch in zip(views, (whole, part), strict=True)
    ]
    assert len(rows_of[1]) == 4 * 8 and all(torch.equal(tokens, rows_of[0][name]) for name, tokens in rows_of[1].items())


def test_padding_counts_only_when_the_recipe_says_so():
    pairs = uneven()
    batch = Pairs(pairs.row, pairs.prompts, pairs.responses, pairs.rewards, 10, 11, canvas=16).batch([2])
    assert batch.scored_length.tolist() == [16, 16] and batch.response_length.tolist() == [3, 3] and (batch.completions[0][3:] == 11).all()
    assert pairs.batch([2]).scored_length.tolist() == [3, 3]


def test_packed_equals_unpacked_and_rows_do_not_see_each_other(network):
    """Log-probs and gradients of pairs of length 1 to 14, all in one pack and each row by itself, agree to 1e-5."""
    batch, algorithm = uneven().batch(range(5)), vrpo()
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, network.profile)
    weight = torch.linspace(-1, 1, len(views.score_row))
    results = []
    for max_tokens in (10**6, 1):
        network.zero_grad()
        runs = micro_batches(views, max_tokens)
        assert len(runs) == (1 if max_tokens > 1 else views.num_rows)
        parts = [micro_batch_log_probs(network, views, run) for run in runs]
        (torch.cat(parts) * weight).sum().backward()
        results.append((torch.cat(parts).detach(), {name: value.grad.clone() for name, value in network.named_parameters()}))
    (packed, packed_gradient), (alone, alone_gradient) = results
    assert (packed - alone).abs().max() <= 1e-5
    for name, gradient in packed_gradient.items():
        assert (gradient - alone_gradient[name]).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max()))
    changed = views.tokens.clone()
    edge = int(views.layout.row_offsets[8])  # every row of the second sample on
    changed[edge:] = (changed[edge:] + 1) % 12
    from dataclasses import replace

    other = token_log_probs(network, replace(views, tokens=changed), 10**6)
    before = views.score_row < 8
    assert torch.equal(other[before], packed[before]) and not torch.equal(other[~before], packed[~before])


def test_the_two_pass_gradient_of_the_whole_loss_is_that_of_autograd(network):
    """The VRPO loss with its regulariser, written out from the paper, differentiated at once, against one row at a time."""
    batch, algorithm = uneven().batch(range(5)), vrpo()
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, network.profile)
    reference = 0.9 * token_log_probs(network, views, 10**6)

    network.zero_grad()
    log_prob = torch.cat([micro_batch_log_probs(network, views, run) for run in micro_batches(views, 10**6)]).double()

    def elbo(values: torch.Tensor) -> torch.Tensor:
        weighted = values * views.score_weight.double()
        draws = [[weighted[(views.score_sample == b) & (views.score_draw == k)].sum() for k in range(8)] for b in range(len(batch))]
        return torch.stack([torch.stack(one).mean() for one in draws])

    policy, fixed = elbo(log_prob), elbo(reference.double())
    gain = 0.2 * (policy - fixed)
    supervised = -(policy[0::2] / torch.from_numpy(batch.response_length[0::2])).mean()
    loss = -F.logsigmoid(gain[0::2] - gain[1::2]).mean() + 0.05 * supervised
    loss.backward()
    direct = {name: value.grad.clone() for name, value in network.named_parameters()}

    network.zero_grad()
    coefficient, _, metrics = algorithm.coefficients(LogProbs(log_prob.detach().float(), reference=reference), views, batch, credit)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["auxiliary/sft"] == pytest.approx(supervised.item(), rel=1e-6)
    for run in micro_batches(views, 1):
        part = coefficient[run.first_score : run.last_score].float()
        (micro_batch_log_probs(network, views, run) * part).sum().backward()
    for name, value in network.named_parameters():
        assert (value.grad - direct[name]).norm() <= 1e-5 * direct[name].norm() + 1e-9


@pytest.mark.parametrize(("on", "members"), [("chosen", [0]), ("rejected", [1]), ("all", [0, 1])])
def test_an_auxiliary_term_counts_the_samples_that_it_names(network, on, members):
    batch = uneven().batch(range(5))
    algorithm = vrpo(f"algorithm.auxiliary=[{{name: sft, weight: 1.0, on: {on}}}]")
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, network.profile)
    log_prob = token_log_probs(network, views, 10**6)
    _, scores, metrics = algorithm.coefficients(LogProbs(log_prob, reference=log_prob), views, batch, credit)
    per_token = -(scores.policy.value / scores.policy.scored_length).view(5, 2)[:, members]
    assert metrics["auxiliary/sft"] == pytest.approx(per_token.mean().item())
    assert metrics["loss"] == pytest.approx(math.log(2) + per_token.mean().item())


def test_a_ready_estimate_of_the_reference_is_as_good_as_its_log_probs(network):
    batch, algorithm = uneven().batch(range(5)), vrpo()
    credit = algorithm.credit(batch)
    views = algorithm.make_views(batch, credit, Noise(0), 0, network.profile)
    policy = token_log_probs(network, views, 10**6)
    reference = 1.1 * policy
    ready = algorithm.estimate(reference, views, credit)
    first, second = (algorithm.coefficients(LogProbs(policy, reference=one), views, batch, credit) for one in (reference, ready))
    assert torch.equal(first[0], second[0]) and first[2] == second[2]


# --------------------------------------------------------------------------------------------------------------- on-policy


def test_online_the_reference_may_draw_its_own_noise(tiny, tmp_path):
    overrides = ("run.phases=[online]", "run.steps=1", "algorithm.updates=1")
    shared, own = (
        train(tiny(f"run.output_dir={tmp_path}/{flag}", *overrides, f"algorithm.shared_noise={flag}"), silent())
        for flag in ("true", "false")
    )
    assert rows(shared)[1]["kl"] == 0.0 and rows(own)[1]["kl"] > 0.0


def test_a_policy_makes_pairs_that_another_run_trains_on(tiny, make, tmp_path):
    policy = train(tiny(f"run.output_dir={tmp_path}", "run.phases=[sft]"), silent())
    out = tmp_path / "made.jsonl"
    summary = sample_pairs(policy, out, 20, [], console=silent())
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert summary.startswith(f"{out}: {len(made)} pairs from 20 prompts") and len(made) >= 8
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in made)
    silent_groups = 20 - len(made)
    assert (f"{silent_groups} without signal" in summary) == (silent_groups > 0)
    before = out.read_bytes()
    sample_pairs(policy, out, 20, [], console=silent())
    assert out.read_bytes() == before
    run = train(make(tmp_path / "trained", "run.steps=1", rows=made), silent())
    assert rows(run)[1]["pairs"] > 0


def test_failed_grades_make_no_pair():
    nan = float("nan")
    assert best_and_worst(np.array([0.5, nan, 1.0, 0.0])) == (2, 3)
    assert best_and_worst(np.array([0.5, nan, 0.5])) == "without signal"
    assert best_and_worst(np.array([0.5, nan, nan])) == "with fewer than two valid grades"


# --------------------------------------------------------------------------------------------------------------- real data


@needs_data("hh-rlhf")
def test_human_preferences_train_end_to_end(tmp_path):
    overrides = [
        *("run.steps=2", "run.eval_every=2", "sft.steps=2", "sft.eval_every=2", "sft.batch_size=4", "pairs.eval_rows=4"),
        *("algorithm.prompts_per_step=4", "task.train.limit=120", "task.train.vocabulary=512", "algorithm.views.draws=2"),
        *("model.config.d_model=32", "model.config.n_heads=2", "model.config.n_layers=1", "model.config.mlp_hidden_size=64"),
        *(f"task.train.path={HH}", f"run.output_dir={tmp_path}"),
    ]
    run = train(load_recipe(RECIPES / "harmless_pairs.yaml", overrides), silent())
    written = rows(run)
    assert [(row["phase"], row["step"]) for row in written] == [(phase, step) for phase in ("sft", "pairs") for step in range(3)]
    assert written[-1]["eval/num_pairs"] == 4 and math.isfinite(written[-1]["eval/pair_margin"])
    assert written[-1]["data/bad_pairs"] == len((run / "bad_pairs.jsonl").read_text().splitlines())
