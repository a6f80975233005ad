"""Code: does the program in the completion pass the task's tests? It runs in the sandbox, out of reach of tests and verdict.

A program that fails, crashes, floods or exceeds its time was graded: status `ok`, value 0, and the detail says what happened. A completion
without a program is `unparsed`. A sandbox that cannot run raises.

Columns, one of
- `test` (source of `check(candidate)`) and `entry_point`, with `prompt` (source that ends in the function's head): HumanEval;
- `test_list` (assert statements), optionally `test_setup_code`, `test_imports` and the reference solution `code`: MBPP;
- `tests`, a list of `{input, output}`: standard input and expected standard output, compared up to white space at the ends of lines.
"""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from rewards import Prompt, column
from rewards.sandbox import MODES, Limits, Verdict, layers, run_script, run_tests
from rlhub.types import RewardResult

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")


@dataclass(frozen=True)
class Config:
    """`partial`: the share of the tests that pass, instead of 1.0 for all and 0 otherwise.

    `deadline_seconds` is for all tests of one program together. `sandbox`: strong, or weak for a machine that cannot do better, see
    docs/sandbox.md.
    """

    partial: bool = False
    deadline_seconds: float = 5.0
    memory_megabytes: int = 512
    sandbox: str = "strong"

    def __post_init__(self) -> None:
        if self.sandbox not in MODES:
            raise ValueError(f"sandbox must be one of {', '.join(MODES)}, got {self.sandbox!r}")
        if self.deadline_seconds <= 0 or self.memory_megabytes < 64:
            got = f"{self.deadline_seconds} and {self.memory_megabytes}"
            raise ValueError(f"deadline_seconds must be positive and memory_megabytes at least 64, got {got}")


def prepare(config: Config) -> None:
    """Starts the sandbox.

    Raises:
        rewards.sandbox.SandboxUnavailable: this machine lacks a layer of it.
    """
    layers(config.sandbox)


def own_limits(config: Config) -> bool:
    """Programs have the sandbox's deadline and limits; the grader itself waits for them only."""
    return True


def version(config: Config) -> str:
    """Of the interpreter that runs the programs."""
    return platform.python_version()


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0 or 1, or the share of tests passed with `partial`; see the module.

    Raises:
        ValueError: the row has no tests or tests that cannot be run.
        rewards.sandbox.SandboxError: the sandbox cannot run here, or failed.
    """
    program, fenced = extract_program(completion)
    if not program.strip():
        return RewardResult(0.0, "unparsed", "no program")
    limits = Limits(deadline_seconds=config.deadline_seconds, memory_megabytes=config.memory_megabytes)
    if "tests" in row:
        verdict = _examples(program, row["tests"], limits, config)
    elif "test_list" in row:
        setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code", "")])
        tests = {"kind": "asserts", "tests": list(row["test_list"]), "setup": setup, "reference": row.get("code", "")}
        verdict = run_tests("", program, {**tests, "partial": config.partial}, limits, config.sandbox)
    elif "test" in row:
        head = row.get("prompt", prompt if isinstance(prompt, str) else "")
        tests = {"kind": "function", "tests": row["test"], "entry_point": column(row, "entry_point")}
        verdict = run_tests(head, program, {**tests, "partial": config.partial}, limits, config.sandbox)
    else:
        raise ValueError(f"code_tests needs a column test, test_list or tests; the task's rows have: {', '.join(map(str, row)) or 'none'}")
    if not fenced and not verdict.passed and "SyntaxError" in verdict.failure:
        return RewardResult(0.0, "unparsed", f"no program: {verdict.failure}")
    value = verdict.passed / verdict.total if config.partial and verdict.total and not verdict.all_passed else float(verdict.all_passed)
    return RewardResult(value, detail=verdict.failure or f"all {verdict.total} tests passed")


def extract_program(completion: str) -> tuple[str, bool]:
    """The last fenced block of Python and True, or the whole text and False. Indentation is kept, so that a function's body stays one.

    Example:
        >>> extract_program("So:\\n```python\\nprint(1)\\n```")
        ('print(1)\\n', True)
    """
    blocks = [code for language, code in _BLOCK.findall(completion) if language.lower() in _PYTHON]
    return (blocks[-1], True) if blocks else (completion, False)


def _examples(program: str, tests: list[dict[str, str]], limits: Limits, config: Config) -> Verdict:
    """Run a program on pairs of input and output, until the first that fails unless partial credit counts; one deadline for all.

    Raises:
        ValueError: there are no tests.
    """
    if not tests:
        raise ValueError("the row's column tests is empty")
    until = time.monotonic() + limits.deadline_seconds
    passed, first = 0, ""
    for number, test in enumerate(tests, start=1):
        left = max(0.01, until - time.monotonic())
        outcome = run_script(program, test["input"], replace(limits, deadline_seconds=left), config.sandbox)
        failure = {"deadline": f"time limit of {config.deadline_seconds:g} s", "output": "too much output"}.get(outcome.ending, "")
        if not failure and outcome.code:
            said = outcome.stderr.decode(errors="replace").strip().splitlines()
            failure = f"ended with code {outcome.code}" + (f", {said[-1][:200]}" if said else "")
        if not failure and _lines(outcome.stdout.decode(errors="replace")) != _lines(test["output"]):
            failure = "other output"
        if failure:
            first = first or f"test {number} of {len(tests)}: {failure}"
        else:
            passed += 1
        if outcome.ending == "deadline" or (failure and not config.partial):
            break
    return Verdict("exit", passed, len(tests), first)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
