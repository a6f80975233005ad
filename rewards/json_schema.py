"""JSON Schema: is the completion JSON that fits a schema?

Columns: none, or `schema` (an object, or its JSON text) for a schema per row.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for

from rewards import Prompt, check_answer, column, extract_answer
from rlhub.types import RewardResult

MAX_CHARACTERS = 1_000_000

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Config:
    """`schema`: JSON text or a file ending in .json. `answer`: tags or whole, see `rewards.extract_answer`; a ``` fence is taken off."""

    schema: str | None = None
    answer: str = "whole"

    def __post_init__(self) -> None:
        check_answer(self.answer)


def grade(prompt: Prompt, completion: str, row: dict[str, Any], config: Config) -> RewardResult:
    """1 where the schema is fulfilled, else 0; `unparsed` where there is no JSON.

    Raises:
        ValueError: there is no schema, or it is not valid.
    """
    schema = config.schema if config.schema is not None else column(row, "schema")
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema))
    text = extract_answer(completion, config.answer)
    if text is None:
        return RewardResult(0.0, "unparsed", "no answer tags")
    fenced = _FENCE.findall(text)
    text = fenced[-1] if fenced else text
    if len(text) > MAX_CHARACTERS:
        return RewardResult(0.0, "unparsed", f"longer than {MAX_CHARACTERS} characters")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return RewardResult(0.0, "unparsed", f"not JSON ({type(error).__name__}: {str(error)[:80]})")
    wrong = best_match(validator.iter_errors(value))
    return RewardResult(float(wrong is None), detail=f"{wrong.json_path}: {wrong.message[:200]}" if wrong else "fits")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    if schema.endswith(".json"):
        with open(schema, encoding="utf-8") as file:
            schema = file.read()
    try:
        parsed = json.loads(schema)
        kind = validator_for(parsed)
        kind.check_schema(parsed)
    except (json.JSONDecodeError, SchemaError) as error:
        raise ValueError(f"not a JSON schema: {schema[:80]!r} ({str(error).splitlines()[0]})") from error
    return kind(parsed)
