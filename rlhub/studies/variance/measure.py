"""`rlhub bench`: measurements of the methods themselves, written as a table, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from rlhub.algorithm.pairs import Pairs, encode
from rlhub.checkpoints.folders import is_model_folder
from rlhub.checkpoints.sealed import resolve_model_path, sealed_checkpoints
from rlhub.checkpoints.tokenizers import load_tokenizer
from rlhub.checkpoints.weights import load_network
from rlhub.config.schema import Recipe
from rlhub.config.tasks import task_kind
from rlhub.errors import DataError, UserError
from rlhub.parts import load_part
from rlhub.records.progress import RunProgress
from rlhub.studies.variance.laboratory import BUDGET, Laboratory, Setting, exact_cells, exact_laws, exact_scores, small_problem
from rlhub.tasks.preferences import Config as PreferenceConfig
from rlhub.tasks.preferences import load_preferences
from rlhub.training.pairs import load_pairs

MANY = 12  # checkpoints of a run that are measured, spread evenly in the logarithm of the step
FIRST_SCORE = 0.02  # the mean absolute score from which a policy counts as having left its reference
USEFUL_FACTOR = 5.0
PRIMARY = "8 x 1"


class Request(NamedTuple):
    """What `rlhub bench variance` was asked for; see its help."""

    checkpoints: Sequence[Path] = ()
    pairs: Path | None = None
    reference: Path | None = None
    num_pairs: int | None = None
    repeats: int | None = None
    gradient_pairs: int = 16
    out: Path | None = None


def variance(recipe: Recipe, request: Request, console: Console) -> dict[str, Any]:
    """Measure, and write `variance.json`, `variance.md`, `variance.png` and the fitted `adaptive.yaml`; returns what the JSON file holds.

    Raises:
        UserError: checkpoints, reference and pairs do not make a measurement.
    """
    torch.set_num_threads(recipe.roles.threads)
    enumerable = not request.checkpoints and request.pairs is None
    problem = _enumerable(recipe, request) if enumerable else _trained(recipe, request, console)
    laboratory = Laboratory(
        problem.setting,
        problem.reference,
        edges=_edges(recipe),
        gradient_pairs=request.gradient_pairs,
    )
    result: dict[str, Any] = {
        "schema": 1,
        "recipe": recipe.run.name,
        "reference": problem.name,
        "pairs": problem.setting.num_pairs,
        "repeats": problem.setting.repeats,
        "beta": problem.setting.beta,
        "form": problem.setting.form,
        "seed": problem.setting.seed,
        "out": str(request.out or Path(recipe.run.output_dir) / f"{recipe.run.name}_variance"),
        "policies": [],
    }
    with RunProgress(console) as progress:
        for place, (name, load) in enumerate(problem.policies):
            done = [0]
            progress.phase(f"{name} ({place + 1} of {len(problem.policies)})", total=laboratory.rows_per_policy(first=place == 0))

            def tick(rows: int, done: list[int] = done) -> None:
                done[0] += rows
                progress.update(done[0])

            laboratory.tick = tick
            result["policies"].append({"policy": name} | _measure(laboratory, load(), enumerable))
            result["trajectory"] = trajectory(result["policies"])
            _write(result)  # after each, so that a measurement that is stopped leaves what it has
    return result


class _Problem(NamedTuple):
    setting: Setting
    reference: nn.Module
    name: str
    policies: list[tuple[str, Any]]  # name, and a function that loads the network


def _enumerable(recipe: Recipe, request: Request) -> _Problem:
    """A random network on responses of at most six tokens, for which everything is known exactly."""
    policy, reference, batch = small_problem(recipe.run.seed, request.num_pairs or 8)
    setting = Setting(batch, _beta(recipe), request.repeats or 200, recipe.run.seed)
    return _Problem(setting, reference, "random network", [("perturbed random network", lambda: policy)])


def _trained(recipe: Recipe, request: Request, console: Console) -> _Problem:
    """What to measure on trained policies: their pairs, the reference they began with, and the policies, loaded one at a time.

    Raises:
        UserError: no policy, or no reference is known.
        CheckpointError: a path holds no model.
    """
    if not request.checkpoints:
        raise UserError("--pairs without a policy to measure; add --checkpoint PATH")
    folders, before = _policy_folders(request.checkpoints)
    path = request.reference or (Path(recipe.model.path) if recipe.model.path else before)
    if path is None:
        raise UserError("which model is the reference? give --reference PATH, the model that training began with")
    folder = resolve_model_path(path)
    dtype, device = getattr(torch, recipe.model.dtype), "cuda" if recipe.roles.gpus_per_learner > 0 else "cpu"
    reference = load_network(folder, dtype).to(device)
    pairs = _pairs(recipe, request, load_tokenizer(str(folder)), reference.max_length, console)
    count = min(request.num_pairs or 64, len(pairs))
    setting = Setting(
        pairs.batch(range(count)),
        _beta(recipe),
        request.repeats or 16,
        recipe.run.seed,
        getattr(load_part("views", recipe.algorithm.views["name"]), "FORM", "elbo"),
        recipe.learner.micro_batch_tokens,
        device,
    )
    models = [resolve_model_path(one) for one in folders]  # a wrong path is said before anything is measured
    policies = [(_name(model), lambda model=model: load_network(model, dtype).to(device)) for model in models]
    return _Problem(setting, reference, _name(path), policies)


def _policy_folders(paths: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """The checkpoints to measure, and the one that the last phase of a run began with."""
    folders: list[Path] = []
    before = None
    for path in paths:
        sealed = [] if is_model_folder(path) or (path / "hf").exists() else sealed_checkpoints(path)
        if not sealed:
            folders.append(path)
            continue
        phase = [folder.name.rpartition("step_")[0] for folder in sealed]
        last = [folder for folder, name in zip(sealed, phase, strict=True) if name == phase[-1]]
        if len(last) < len(sealed):
            before = sealed[-len(last) - 1]
        chosen = np.unique(np.geomspace(1, len(last), min(MANY, len(last))).round().astype(int)) - 1
        folders += [last[index] for index in chosen]
    return folders, before


def _pairs(recipe: Recipe, request: Request, tokenizer: Any, context: int, console: Console) -> Pairs:
    """The held-out pairs of the recipe, or those of `--pairs`.

    Raises:
        UserError: there is no preference data.
        DataError: no usable row is a pair.
    """
    if request.pairs is None:
        if not recipe.pairs.data and task_kind(recipe) != "preferences":
            raise UserError(
                "no pairs to measure on: give --pairs FILE.jsonl with prompt, chosen, rejected, or a recipe with preference data"
            )
        pairs = load_pairs(recipe, tokenizer, context).held_out
    else:
        good, unreadable = load_preferences(PreferenceConfig(str(request.pairs), held_out_one_in=0), "train")
        pairs, unusable = encode(good, tokenizer, context)
        if unreadable or unusable:
            first = [*unreadable, *unusable][0]
            console.print(f"{len(unreadable) + len(unusable)} rows left out; row {first.number}: {first.reason}", markup=False)
    if not len(pairs) or pairs.group_size != 2:
        raise DataError(f"{request.pairs or 'the data of the recipe'} holds {len(pairs)} usable rows, none of them a pair")
    return pairs


def _measure(laboratory: Laboratory, policy: nn.Module, enumerable: bool) -> dict[str, Any]:
    """The cells of one policy, with the exact variances where all masks can be enumerated, and the factor that sharing noise gains."""
    setting = laboratory.setting
    if not enumerable:
        measured = laboratory.measure(policy)
    else:
        laws = [exact_laws(network, setting) for network in (policy, laboratory.reference)]
        scores = exact_scores(laws[0], laws[1], setting.beta)
        measured = laboratory.measure(policy, scores)
        exact = exact_cells(laws[0], laws[1], setting.beta, measured["edges"])
        measured["exact_mean"] = float(scores.mean())
        for row in measured["cells"]:
            row["exact"] = exact[row["cell"], row["shared"]]
    variances = {(row["cell"], row["shared"]): row["score_variance"] for row in measured["cells"]}
    for row in measured["cells"]:
        shared = variances[row["cell"], True]
        row["factor"] = variances[row["cell"], False] / shared if shared > 0 else None
    return measured


def trajectory(policies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How the gain of sharing falls as the policies leave their reference, at 8 levels of one mask.

    Keys:
        `factor`: unshared over shared variance at the first policy with a mean absolute score of at least 0.02.
        `below_5`: the mean absolute score at which the factor falls below 5, linear between policies in the logarithms; None while it
            has not.
    """
    points = [(policy["mean_absolute_score"], factor) for policy in policies if (factor := primary_factor(policy)) is not None]
    first = next(((score, factor) for score, factor in points if score >= FIRST_SCORE), None)
    below = next((index for index, (_, factor) in enumerate(points) if factor < USEFUL_FACTOR), None)
    crossing = None
    if below == 0:
        crossing = points[0][0]
    elif below is not None:
        (low_score, high), (high_score, low) = points[below - 1], points[below]
        share = np.log(high / USEFUL_FACTOR) / np.log(high / low)
        crossing = float(np.exp(np.log(low_score) + share * np.log(high_score / low_score)))
    return {"score": first and first[0], "factor": first and first[1], "below_5": crossing}


def primary_factor(policy: dict[str, Any]) -> float | None:
    """Unshared over shared variance of the score at 8 x 1; None where the shared one is 0."""
    return next(row["factor"] for row in policy["cells"] if row["cell"] == PRIMARY)


def table_rows(policy: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one policy's table; an entry is "shared / independent noise"."""
    by_cell: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in policy["cells"]:
        by_cell.setdefault(row["cell"], {})[row["shared"]] = row
    columns = {
        "score": "score_variance",
        "predicted": "predicted",
        "exact": "exact",
        "loss": "loss_variance",
        "gradient": "gradient_variance",
    }
    shown = {title: key for title, key in columns.items() if any(row.get(key) is not None for row in policy["cells"])}
    rows = []
    for cell, pair in by_cell.items():
        values = [f"{number(pair[True].get(key))} / {number(pair[False].get(key))}" for key in shown.values()]
        rows.append([cell, str(pair[True]["forwards"]), *values, number(pair[True]["factor"])])
    return ["n_t x n_y", "cost", *shown, "factor"], rows


def trajectory_rows(policies: Sequence[dict[str, Any]], digits: int = 3) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table over policies: variances of the score at eight forwards, under shared noise where nothing is said."""
    shown = {
        "8 x 1 indep.": (PRIMARY, False),
        **{cell: (cell, True) for cell in (PRIMARY, "1 x 8", "stratified", "coupled", "adaptive")},
    }
    rows = []
    for policy in policies:
        variance = {(row["cell"], row["shared"]): row["score_variance"] for row in policy["cells"]}
        values = [number(variance[key], digits) for key in shown.values()]
        rows.append([policy["policy"], number(policy["mean_absolute_score"], digits), *values, number(primary_factor(policy), digits)])
    return ["policy", "mean abs. score", *shown, "factor"], rows


def number(value: float | None, digits: int = 3) -> str:
    """A number with a few digits; a dash for what was not measured or is infinite."""
    return "-" if value is None else f"{value:.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"


def summary(result: dict[str, Any]) -> str:
    """What the measurement says of sharing, in words."""
    found = result["trajectory"]
    if found["factor"] is None:
        return f"no policy has a mean absolute score of {FIRST_SCORE} or more"
    text = f"sharing noise divides the variance of the score by {found['factor']:,.1f} at a mean absolute score of {found['score']:.3g}"
    if found["below_5"] is None:
        return f"{text}, and by at least 5 at every policy measured"
    return f"{text}, and by less than 5 from a score of {found['below_5']:.2g} on"


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    tables = [
        (f"{policy['policy']}: variance per pair, shared / independent noise", *table_rows(policy)) for policy in result["policies"][-1:]
    ]
    if len(result["policies"]) > 1:
        tables.append(("variance of the score along the policies", *trajectory_rows(result["policies"], digits=2)))
    for title, header, rows in tables:
        # Ten columns of numbers fit 80 characters when nothing is boxed; a number that was cut would mislead, so words wrap instead.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for name in header:
            table.add_column(name, overflow="fold", min_width=max(len(word) for word in name.split()))
        for row in rows:
            table.add_row(*(value.removeprefix("pairs_step_").removeprefix("step_") for value in row))
        console.print(table)
    console.print(summary(result), markup=False, highlight=False)


def _write(result: dict[str, Any]) -> None:
    """The folder of a measurement: numbers, tables, plot and the fitted adaptive views."""
    from rlhub.studies.variance.plot import draw_variance

    out, policies = Path(result["out"]), result["policies"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "variance.json").write_text(json.dumps(result, indent=2) + "\n")
    counts = f"{len(policies)} policies, {result['pairs']} pairs, {result['repeats']} repeats, beta {result['beta']}"
    parts = [f"{counts}: {summary(result)}. Variances are those of one pair, under shared / independent noise."]
    if len(policies) > 1:
        parts.append(_markdown(*trajectory_rows(policies)))
    for policy in policies:
        parts += [f"## {policy['policy']}, mean absolute score {policy['mean_absolute_score']:.3g}", _markdown(*table_rows(policy))]
    (out / "variance.md").write_text("\n\n".join(parts) + "\n")
    draw_variance(result).save(out / "variance.png")
    (out / "adaptive.yaml").write_text(
        f"# Fitted by rlhub bench variance to {policies[-1]['policy']}; put this file into the recipe's extends.\n"
        f"algorithm:\n  views: {{ name: adaptive, draws: {BUDGET}, edges: {policies[-1]['edges']} }}\n"
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _beta(recipe: Recipe) -> float:
    return float(recipe.algorithm.objective.get("beta", 0.2))


def _edges(recipe: Recipe) -> list[float] | None:
    """The recipe's cells for the views `adaptive`, if it has as many as are measured."""
    edges = recipe.algorithm.views.get("edges") or []
    return edges if len(edges) == BUDGET + 1 else None


def _name(path: Path) -> str:
    path = path.parent if path.name == "hf" else path
    return path.name
