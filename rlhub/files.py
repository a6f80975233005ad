"""Files that are whole at any moment, and values as JSON has them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` as JSON data: numpy and torch numbers and arrays become Python ones, what is not finite becomes None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes a file so that at any moment a reader, or a machine that lost power, has either the old content or the new one.

    Two processes that write the same file at once leave the content of one of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
