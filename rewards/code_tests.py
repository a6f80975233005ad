"""Code: does the program in the completion pass the task's tests? It runs in the sandbox, out of reach of tests and verdict.

The program is found by `rewards.answers.programs`: the fenced block that defines what the tests call, or the part of an unfenced text that
is Python. One that fails, crashes, floods or exceeds its time was graded: status `ok`, value 0, and the detail says what happened. A
completion without a program is `unparsed`; a row whose tests cannot be run is `rejected` with the reason. A sandbox that cannot run raises.

Columns: the tests, in any of the forms of `rewards.answers.program_tests` (HumanEval, MBPP, AceCode, pairs of input and output, APPS,
TACO), and `prompt` where a completion may continue its source. Standard output is compared line by line up to white space, numbers with a
point up to `tolerance`.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass, replace
from typing import Any

from rewards import Prompt
from rewards.answers.program_tests import read_tests, same_output
from rewards.answers.programs import find_program
from rewards.sandbox import MODES, Limits, SandboxError, Verdict, layers, run_script, run_tests
from rlhub.types import RewardResult

COLUMNS = ("tests|input_output|test_list|test_cases|test",)


@dataclass(frozen=True)
class Config:
    """`partial`: the share of the tests that pass, instead of 1.0 for all and 0 otherwise.

    `deadline_seconds` is for all tests of one program together. `sandbox`: strong, or weak for a machine that cannot do better, see
    docs/sandbox.md. `tolerance`: relative, of numbers with a point in standard output and in values of calls, absolute below 1.
    """

    partial: bool = False
    deadline_seconds: float = 5.0
    memory_megabytes: int = 512
    sandbox: str = "strong"
    tolerance: float = 1e-6

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
        rewards.sandbox.SandboxError: the sandbox cannot run here, or failed.
    """
    try:
        return _graded(prompt, completion, row, config)
    except SandboxError:
        raise
    except ValueError as error:
        return RewardResult(math.nan, "rejected", str(error))


def _graded(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """As `grade`.

    Raises:
        ValueError: the row has no tests or tests that cannot be run.
        rewards.sandbox.SandboxError: the sandbox cannot run here, or failed.
    """
    tests = read_tests(row, completion, config.tolerance)
    program = find_program(row.get("prompt", prompt), completion, tests.names)
    if not program.code.strip():
        return RewardResult(0.0, "unparsed", "no program")
    limits = Limits(deadline_seconds=config.deadline_seconds, memory_megabytes=config.memory_megabytes)
    partial = {"partial": config.partial}
    if tests.examples:
        verdict = _examples(program.code, tests.examples, limits, config)
    elif tests.statements:
        given = {"kind": "asserts", "tests": tests.statements, "setup": tests.setup, "reference": tests.reference}
        verdict = run_tests("", program.code, given | partial, limits, config.sandbox)
    else:
        given = {"kind": "function", "tests": tests.check, "entry_point": tests.names[0]}
        verdict = run_tests(program.head, program.code, given | partial, limits, config.sandbox)
    if not program.fenced and not verdict.passed and "SyntaxError" in verdict.failure:
        return RewardResult(0.0, "unparsed", f"no program: {verdict.failure}")
    value = verdict.passed / verdict.total if config.partial and verdict.total and not verdict.all_passed else float(verdict.all_passed)
    return RewardResult(value, detail=verdict.failure or f"all {verdict.total} tests passed")


def _examples(program: str, tests: list[tuple[str, str]], limits: Limits, config: Config) -> Verdict:
    """Run a program on pairs of input and output, until the first that fails unless partial credit counts; one deadline for all."""
    until = time.monotonic() + limits.deadline_seconds
    passed, first = 0, ""
    for number, (given, wanted) in enumerate(tests, start=1):
        left = max(0.01, until - time.monotonic())
        outcome = run_script(program, given, replace(limits, deadline_seconds=left), config.sandbox)
        failure = {"deadline": f"time limit of {config.deadline_seconds:g} s", "output": "too much output"}.get(outcome.ending, "")
        if not failure and outcome.code:
            said = outcome.stderr.decode(errors="replace").strip().splitlines()
            failure = f"ended with code {outcome.code}" + (f", {said[-1][:200]}" if said else "")
        if not failure and not same_output(outcome.stdout.decode(errors="replace"), wanted, config.tolerance):
            failure = "other output"
        if failure:
            first = first or f"test {number} of {len(tests)}: {failure}"
        else:
            passed += 1
        if outcome.ending == "deadline" or (failure and not config.partial):
            break
    return Verdict("exit", passed, len(tests), first)
