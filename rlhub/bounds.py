"""Numbers with bounds as types, for fields that a user sets. Unlike pydantic's of these names they take neither `true` nor "8".

Settings with such fields are plain dataclasses; whoever reads them from a file checks them (`rlhub.config.values`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict

PositiveInt = Annotated[int, Strict(), Field(ge=1)]
NonNegativeInt = Annotated[int, Strict(), Field(ge=0)]
PositiveFloat = Annotated[float, Strict(), Field(gt=0)]
NonNegativeFloat = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
