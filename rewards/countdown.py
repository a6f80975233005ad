"""Countdown: does an expression over the given numbers have the target as its value?

Values as ESPO and d1 published them: 0 without an answer, 0.1 for an answer that is wrong in any way (other numbers than the given ones,
each exactly once; not an expression; another value), 1.0 when right. Unlike the published grader this one evaluates no `**`, `//`, unary
plus or decimal point, which its character set let through, and computes with exact fractions instead of floats.

Columns: `numbers` (list of int), `target` (int).
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rewards import Prompt, check_answer, column, extract_answer
from rlhub.types import RewardResult

TOLERANCE = Fraction(1, 10**5)
MAX_CHARACTERS = 256  # keeps a hostile answer from exhausting the parser

_ALLOWED = re.compile(r"[0-9+\-*/().\s]+")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Config:
    """`answer`: tags grades the last `<answer>`; whole grades the entire completion, which is worth 0 unless it is an expression."""

    answer: str = "tags"

    def __post_init__(self) -> None:
        check_answer(self.answer)


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """0, 0.1 or 1.0; see the module."""
    numbers, target = column(row, "numbers"), int(column(row, "target"))
    answer = extract_answer(completion, config.answer)
    if answer is None:
        return RewardResult(0.0, "unparsed", "no answer tags")
    if not _ALLOWED.fullmatch(answer) or not any(character.isdigit() for character in answer):
        return RewardResult(0.0 if config.answer == "whole" else 0.1, "unparsed", "no expression")
    if len(answer) > MAX_CHARACTERS:
        return RewardResult(0.1, detail=f"longer than {MAX_CHARACTERS} characters")
    if Counter(map(int, re.findall(r"[0-9]+", answer))) != Counter(map(int, numbers)):
        return RewardResult(0.1, detail="other numbers")
    value = evaluate(answer)
    if value is None:
        return RewardResult(0.1, detail="cannot be evaluated")
    if abs(value - target) >= TOLERANCE:
        return RewardResult(0.1, detail=f"value {value}")
    return RewardResult(1.0, detail="right")


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of integers, `+ - * /`, parentheses and unary minus; None for anything else or a division by 0.

    Example:
        >>> evaluate("2 * (4 - 3) / 4")
        Fraction(1, 2)
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=number) if type(number) is int:
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=symbol, right=right) if type(symbol) in _OPERATORS:
            return _OPERATORS[type(symbol)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is not allowed in an expression")
