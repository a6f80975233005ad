"""False positives and false negatives of `math_answer` and of plain Math-Verify on the same answers, side by side.

    python benchmarks/math_verdicts.py [--data FOLDER] [--pairs 5000] [--every 1] [--seconds 3] [--json]

Three parts, each of rows (gold, completion, label):
  solutions  GSM8K's worked solutions against their own gold, its labelled model solutions, and the pairs of tests/unit/;
  pairs      generated numbers and expressions, half of them equal, labelled by exact arithmetic;
  endings    the right answers of the GSM8K test set (and as many wrong ones) in ten common endings.

FOLDER holds GSM8K's train.jsonl and test.jsonl (`question`, `answer`) and model_solutions_labelled.jsonl (`completion`, `answer`, `label`);
without it only the pairs of the tests and the generated ones are graded. `--every N` takes each Nth row of GSM8K. Plain Math-Verify is
`verify(parse("$gold$"), parse(completion))` with its defaults; of a text with `####`, which it does not know, it gets what follows.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from rewards import load_grader
from rlhub.tasks.jsonl import read_jsonl

REQUIRED = 10_000  # answers per second on GSM8K
ENDINGS = [
    "#### {}",
    "The answer is {}.",
    "**Answer:** {}",
    r"So the final answer is $\boxed{{{}}}$.",
    r"\boxed{{{}}}" + "\n\n" + r"\boxed{{{}}}",
    "So the total is **{}**.",
    "Therefore, the answer is: **{}**",
    "<answer>{}</answer>",
    "That gives {}. This answer is correct.",
    "所以答案是{}。",
]

Row = tuple[str, str, bool]


def main() -> None:
    """Prints the table, or with --json the counts and the first wrong verdicts of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    test = _rows(arguments.data, "test.jsonl", arguments.every)
    parts = {"solutions": solutions(arguments.data, arguments.every), "pairs": pairs(arguments.pairs), "endings": endings(test)}
    report: dict[str, Any] = {
        name: {"rows": len(rows), "math_answer": errors(ours(), rows), "math_verify": errors(theirs(), rows)}
        for name, rows in parts.items()
    }
    if test:
        report["answers_per_second"] = speed([(row["answer"], row["answer"]) for row in test], arguments.seconds)
        report["required"] = REQUIRED
    print(json.dumps(report) if arguments.json else table(report))


def ours() -> Callable[[str, str], bool]:
    grader = load_grader({"name": "math_answer"})
    grader.prepare()
    return lambda gold, completion: grader("", completion, {"answer": gold}).value == 1.0


def theirs() -> Callable[[str, str], bool]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def right(gold: str, completion: str) -> bool:
        gold, completion = (text.rpartition("####")[2] if "####" in text else text for text in (gold, completion))
        return verify(parse(f"${gold.strip()}$"), parse(completion))

    return right


def errors(right: Callable[[str, str], bool], rows: list[Row]) -> dict[str, Any]:
    """Counts of wrong verdicts, and the first of them."""
    wrong = [row for row in rows if right(row[0], row[1]) != row[2]]
    return {
        "false_positives": sum(not label for _, _, label in wrong),
        "false_negatives": sum(label for _, _, label in wrong),
        "first": [list(row) for row in wrong[:20]],
    }


def solutions(folder: Path | None, every: int) -> list[Row]:
    """Worked and labelled solutions of GSM8K and the pairs of the tests."""
    rows = [
        (row["answer"].rpartition("####")[2].strip(), row["answer"], True)
        for name in ("train.jsonl", "test.jsonl")
        for row in _rows(folder, name, every)
    ]
    rows += [(row["answer"], row["completion"], bool(row["label"])) for row in _rows(folder, "model_solutions_labelled.jsonl", every)]
    tests = Path(__file__).parents[1] / "tests"
    rows += [(row["answer"], row["completion"], row["label"]) for row in _rows(tests / "unit", "math_pairs.jsonl", 1)]
    sys.path[:0] = [str(tests), str(tests / "unit")]
    import test_math_answer

    rows += [(str(gold), completion, True) for gold, completion in test_math_answer.RIGHT]
    rows += [(str(gold), completion, False) for gold, completion in test_math_answer.WRONG]
    return rows


def endings(test: list[dict[str, Any]]) -> list[Row]:
    """Each answer in ten endings, and in each ending another row's answer."""
    answers = [row["answer"].rpartition("####")[2].strip() for row in test]
    steps = [row["answer"].rpartition("####")[0].strip() for row in test]
    rows = []
    for place, gold in enumerate(answers):
        other = answers[(place + 7) % len(answers)]
        for ending in ENDINGS:
            rows.append((gold, f"{steps[place]}\n{ending.format(gold, gold)}", True))
            rows.append((gold, f"{steps[place]}\n{ending.format(other, other)}", other.replace(",", "") == gold.replace(",", "")))
    return rows


def pairs(count: int) -> list[Row]:
    """Numbers and expressions, half of them equal to their gold and half close to it, from a seed of their own."""
    draw = random.Random(14)
    kinds = [_rational, _integer, _power, _decimal, _radical, _polynomial, _line, _constant, _set]
    rows = []
    while len(rows) < count:
        change = 0 if len(rows) % 2 else draw.choice([-2, -1, 1, 3])
        gold, answer = kinds[len(rows) // 2 % len(kinds)](draw, change)
        rows.append((gold, rf"The answer is $\boxed{{{answer}}}$.", change == 0))
    return rows


def _rational(draw: random.Random, change: int) -> tuple[str, str]:
    top, bottom, factor = draw.randint(1, 10 ** draw.randint(1, 20)), draw.randint(2, 10 ** draw.randint(1, 20)), draw.randint(1, 99)
    shown = rf"\dfrac{{{top * factor + change}}}{{{bottom * factor}}}"
    return rf"\frac{{{top}}}{{{bottom}}}", shown if Fraction(top * factor + change, bottom * factor) else "-1"


def _integer(draw: random.Random, change: int) -> tuple[str, str]:
    value = draw.randint(-(10 ** draw.randint(1, 60)), 10 ** draw.randint(1, 60))
    return str(value), draw.choice(["{}", "{:,}", "x = {}"]).format(value + change)


def _power(draw: random.Random, change: int) -> tuple[str, str]:
    base, exponent, added = draw.randint(2, 30), draw.randint(2, 120), draw.randint(1, 10**6)
    if draw.random() < 0.5:
        return rf"{base}^{{{exponent}}} + {added}", rf"{added + change} + {base}^{{{exponent}}}"
    return rf"\frac{{1}}{{{base}^{{{exponent}}}}}", rf"{base}^{{{-exponent + change}}}"


def _decimal(draw: random.Random, change: int) -> tuple[str, str]:
    digits, exponent = draw.randint(100, 99999), draw.randint(5, 40)
    shown = digits + change
    return f"{digits}e-{exponent}", rf"{shown} \times 10^{{-{exponent}}}"


def _radical(draw: random.Random, change: int) -> tuple[str, str]:
    factor, inside, added = draw.randint(2, 30), draw.choice([2, 3, 5, 6, 7, 10, 11]), draw.randint(1, 10**6)
    return rf"{added}+{factor}\sqrt{{{inside}}}", rf"\sqrt{{{inside * factor**2}}}+{added + change}"


def _polynomial(draw: random.Random, change: int) -> tuple[str, str]:
    a, b = draw.randint(1, 30), draw.randint(1, 30)
    return f"(x+{a})(x-{b})", f"x^2{a - b:+d}x{-a * b + change:+d}"


def _line(draw: random.Random, change: int) -> tuple[str, str]:
    slope, height = draw.randint(2, 30), draw.randint(1, 50)
    return f"y={slope}x+{height}", f"{slope}x-y+{height + change}=0" if height + change else f"{slope}x-y=0"


def _constant(draw: random.Random, change: int) -> tuple[str, str]:
    constant, factor, power = draw.choice([r"\pi", "e", r"\sqrt{2}"]), draw.randint(2, 500), draw.randint(1, 30)
    return rf"\frac{{{factor}{constant}}}{{10^{{{power}}}}}", rf"{factor + change} \cdot 10^{{-{power}}} \cdot {constant}"


def _set(draw: random.Random, change: int) -> tuple[str, str]:
    low, high = sorted(draw.sample(range(-99, 99), 2))
    return rf"\{{{low}, {high}\}}", rf"\{{{high}, {low + change if low + change != high else low - 100}\}}"


def speed(items: Iterable[tuple[str, str]], seconds: float) -> float:
    """Answers that `math_answer` grades in a second of CPU time."""
    right, items, graded = ours(), list(items), 0
    start = time.process_time()
    while time.process_time() - start < seconds:
        for gold, completion in items:
            right(gold, completion)
        graded += len(items)
    return graded / (time.process_time() - start)


def table(report: dict[str, Any]) -> str:
    lines = ["part | rows | false positives: ours, Math-Verify | false negatives: ours, Math-Verify"]
    for name in ("solutions", "pairs", "endings"):
        part = report[name]
        counts = [f"{part[grader][kind]:,}" for kind in ("false_positives", "false_negatives") for grader in ("math_answer", "math_verify")]
        lines.append(f"{name} | {part['rows']:,} | {', '.join(counts[:2])} | {', '.join(counts[2:])}")
    if "answers_per_second" in report:
        lines.append(f"answers per second of CPU time on GSM8K: {report['answers_per_second']:,.0f} (required: {REQUIRED:,})")
    return "\n".join(lines)


def _rows(folder: Path | None, name: str, every: int) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(str(folder / name))][::every] if folder else []


if __name__ == "__main__":
    main()
