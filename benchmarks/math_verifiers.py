r"""Right and wrong verdicts of `math_answer` and of plain Math-Verify, side by side on the same answers.

    python benchmarks/math_verifiers.py [LABELLED.jsonl ...] [--pairs 5000] [--endings 300] [--seed 0] [--json]

Three sets. Labelled: the rows of the files, with `completion`, `answer` and `label` (or `correct`). Generated: pairs of numbers and
expressions whose equality is known from how they were made: neighbours among fractions, integers up to 10^60, powers, radicals and
decimals, polynomials multiplied out, one in two changed in one place. Endings: the gold answer and a wrong one of each of some rows, in ten
common endings of a solution. `holds` is true when ours has no more false positives and no more false negatives on any of the sets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rewards import load_grader
from rlhub.tasks.jsonl import read_jsonl

ENDINGS = [
    "The answer is {}.",
    r"So we get $\boxed{{{}}}$.",
    "#### {}",
    "**{}**",
    "<answer>{}</answer>",
    "Answer: {}",
    "That makes {}. The answer is correct.",
    "\\boxed{{{0}}}\n\n\\boxed{{{0}}}",
    "**Final answer:** ${}$",
    "所以答案是 {}。",
]


class Pair(NamedTuple):
    """A gold answer, a completion, and whether the completion is right."""

    gold: str
    completion: str
    label: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="LABELLED.jsonl")
    parser.add_argument("--pairs", type=int, default=5000, help="generated ones")
    parser.add_argument("--endings", type=int, default=300, help="rows that are rewritten, each ten times right and ten times wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sets = {}
    labelled = [pair for file in arguments.files for pair in read_labelled(file)]
    if labelled:
        sets["labelled"] = labelled
    sets["generated"] = list(generated(arguments.pairs, arguments.seed))
    golds = list(dict.fromkeys(pair.gold for pair in labelled or sets["generated"]))[: arguments.endings]
    sets["endings"] = list(endings(golds))
    report: dict[str, Any] = {"holds": True}
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for name, pairs in sets.items():
            report[name] = {"pairs": len(pairs), "right": sum(pair.label for pair in pairs)}
            for verifier in (ours, math_verify):
                verdicts = list(tqdm(pool.map(verifier, pairs, chunksize=100), total=len(pairs), desc=f"{name}, {verifier.__name__}"))
                report[name][verifier.__name__] = confusion(pairs, verdicts)
            left, right = report[name]["ours"], report[name]["math_verify"]
            report["holds"] &= all(left[kind] <= right[kind] for kind in ("false_positives", "false_negatives"))
    print(json.dumps(report) if arguments.json else table(report))


def table(report: dict[str, Any]) -> str:
    lines = ["| answers | right | verifier | wrong counted as right | right counted as wrong |", "|---|---|---|---|---|"]
    for name in (name for name in report if name != "holds"):
        for verifier in ("ours", "math_verify"):
            counts = report[name][verifier]
            total = f"{report[name]['pairs']:,} {name} | {report[name]['right']:,}"
            lines.append(f"| {total} | {verifier} | {counts['false_positives']:,} | {counts['false_negatives']:,} |")
    return "\n".join([*lines, "", f"holds: {report['holds']}"])


def confusion(pairs: list[Pair], verdicts: list[bool]) -> dict[str, Any]:
    wrong = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if pair.label != verdict]
    return {
        "false_positives": sum(verdict for _, verdict in wrong),
        "false_negatives": sum(not verdict for _, verdict in wrong),
        "examples": [[pair.gold[-80:], pair.completion[-80:], verdict] for pair, verdict in wrong[:10]],
    }


def ours(pair: Pair) -> bool:
    return _grader()("", pair.completion, {"answer": pair.gold}).value == 1.0


def _grader(loaded: list[Callable[..., Any]] = []) -> Callable[..., Any]:  # noqa: B006  one for each process
    if not loaded:
        loaded.append(load_grader({"name": "math_answer"}))
    return loaded[0]


def math_verify(pair: Pair) -> bool:
    """Math-Verify as its README calls it; a bare gold answer is put into dollars, as it asks."""
    from math_verify import parse, verify

    gold = pair.gold.rpartition("####")[2].strip()
    return bool(verify(parse(gold if "$" in gold else f"${gold}$"), parse(pair.completion)))


def read_labelled(file: str) -> Iterator[Pair]:
    for _, row in read_jsonl(file):
        yield Pair(str(row["answer"]), row["completion"], str(row["label"] if "label" in row else row["correct"]).lower() in ("true", "1"))


def endings(golds: list[str]) -> Iterator[Pair]:
    """Ten endings with each gold answer, and ten with that of another row."""
    answers = [gold.rpartition("####")[2].strip() for gold in golds]
    for number, answer in enumerate(answers):
        other = next((one for one in answers[number + 1 :] + answers[:number] if one != answer), None)
        for ending in ENDINGS:
            yield Pair(golds[number], ending.format(answer), True)
            if other is not None:
                yield Pair(golds[number], ending.format(other), False)


def generated(count: int, seed: int) -> Iterator[Pair]:
    """Pairs whose equality is exact arithmetic's, half of them unequal by one unit in one place."""
    makers = [fraction, integer, power, radical, decimal, polynomial, scientific]
    for number in range(count):
        noise = np.random.Generator(np.random.Philox(key=[seed, number]))
        gold, answer, equal = makers[number % len(makers)](noise, bool(noise.integers(2)))
        yield Pair(gold, rf"\boxed{{{answer}}}", equal)


def fraction(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    top, bottom, factor = (int(noise.integers(1, 10 ** int(noise.integers(1, 7)))) for _ in range(3))
    other = (top * factor, bottom * factor) if same else (top + 1, bottom + 1)
    return rf"\frac{{{top}}}{{{bottom}}}", rf"\frac{{{other[0]}}}{{{other[1]}}}", Fraction(top, bottom) == Fraction(*other)


def integer(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    number = int("".join(map(str, noise.integers(1, 10, int(noise.integers(1, 61))))))
    return str(number), f"{number if same else number + 1:,}".replace(",", "" if noise.integers(2) else ","), same


def power(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    base, exponent, added = int(noise.integers(2, 12)), int(noise.integers(2, 90)), int(noise.integers(0, 5))
    gold = f"{base}^{{{exponent}}}" + (f"+{added}" if added else "")
    return gold, str(base**exponent + added + (not same)), same


def radical(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    outside, inside, other = int(noise.integers(2, 60)), int(noise.integers(2, 60)), int(noise.integers(2, 60))
    squared = outside**2 * inside + (not same)
    return rf"{outside}\sqrt{{{inside}}}+\sqrt{{{other}}}", rf"\sqrt{{{other}}}+\sqrt{{{squared}}}", same


def decimal(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    places = int(noise.integers(1, 9))
    number = int(noise.integers(1, 10**places)) + 10**places * int(noise.integers(0, 1000))
    written = f"{number // 10**places}.{number % 10**places:0{places}d}"
    other = number if same else number + 1
    return written, rf"\frac{{{other}}}{{{10**places}}}", same


def polynomial(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    a, b, c, d = (int(noise.integers(1, 30)) for _ in range(4))
    return f"({a}x+{b})({c}x+{d})", f"{b * d + (not same)}+{a * c}x^2+{a * d + b * c}x", same


def scientific(noise: np.random.Generator, same: bool) -> tuple[str, str, bool]:
    digits, exponent = int(noise.integers(10, 1000)), int(noise.integers(-40, 40))
    other = exponent if same else exponent + 1
    return f"{digits / 100:g}e{exponent}", rf"{digits / 100:g} \times 10^{{{other}}}", same


if __name__ == "__main__":
    main()
