"""Numbers with bounds as types, for fields that a user sets. Unlike pydantic's of these names they take neither `true` nor "8".

Settings with such fields are plain dataclasses; whoever reads them from a file checks them (`rlhub.config.values`). This module does not
import pydantic, as every grading process would pay for it at its start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le


class Strict:
    """Marks a number that is not made from other types, as `pydantic.Strict` does."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(source), "strict": True}


PositiveInt = Annotated[int, Strict(), Ge(1)]
NonNegativeInt = Annotated[int, Strict(), Ge(0)]
PositiveFloat = Annotated[float, Strict(), Gt(0)]
NonNegativeFloat = Annotated[float, Strict(), Ge(0)]
Share = Annotated[float, Strict(), Ge(0), Le(1)]
