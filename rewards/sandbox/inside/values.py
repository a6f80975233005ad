"""Values on their way between tests and program: JSON that is rebuilt into exact built-in types and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

TEXT_CHARACTERS = 200  # of an error's text
BIG_INTEGER_BITS = 10_000  # beyond, decimal digits are refused by Python and slow; hexadecimal ones are not
CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """A plain value as JSON can carry it, with subclasses reduced to their built-in type; anything else as the number `keep` gives it.

    Example:
        >>> encode((1, [2.5, None]), id)
        ['tuple', 1, ['list', 2.5, None]]
    """
    if value is None or isinstance(value, (bool, float)):
        return value if type(value) in (bool, float, type(None)) else float.__float__(value)
    if isinstance(value, int):
        value = int.__int__(value)
        return value if value.bit_length() < BIG_INTEGER_BITS else ["int", hex(value)]
    if isinstance(value, str):
        return str.__str__(value)
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return [name, *(encode(item, keep) for item in kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(key, keep), encode(item, keep)] for key, item in dict.items(value))]
    if type(value) is complex:
        return ["complex", value.real, value.imag]
    if type(value) in (bytes, bytearray):
        return [type(value).__name__, value.hex()]
    return ["object", keep(value)]


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The inverse of `encode`; `find` gives the object of a number.

    Raises:
        ValueError, TypeError: not something that `encode` makes.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("a bare object")
        return data
    match data:
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case [("bytes" | "bytearray") as kind, str(digits)]:
            return bytes.fromhex(digits) if kind == "bytes" else bytearray.fromhex(digits)
        case ["object", int(handle)]:
            return find(handle)
        case ["dict", *pairs]:
            return {decode(key, find): decode(item, find) for key, item in pairs}
        case [str(kind), *items] if kind in CONTAINERS:
            return CONTAINERS[kind](decode(item, find) for item in items)
    raise ValueError("an unknown kind of value")


def send(stream: BinaryIO, message: Any) -> None:
    """One message, a line of JSON."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()
