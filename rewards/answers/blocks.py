"""The fenced blocks of a text as models write them, which is more than CommonMark allows, and what parses as Python."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass
from functools import lru_cache

from rlhub.types import Prompt

_OPENING = re.compile(
    r"^(?:(?P<before>.*?)(?P<mark>(?<!`)`{3,})|(?P<prefix>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(?P<tildes>~{3,}))(?P<after>[^`\n]*)$"
)
_INLINE = re.compile(r"(?P<mark>(?<!`)`{3,}+|(?<!~)~{3,}+)[ \t]*(?:(?:python3?|py)\b)?(?P<code>[^`~]+)(?P=mark)")
_PREFIX = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?")
_CODE = re.compile(r"(?:import|from|def|class)\b|@")  # begins a program on the line of its fence
_DOCUMENTS = ("markdown", "md")
_PYTHON = ("python", "python3", "py", "")
MAX_CLOSINGS = 20  # lines that may close a block and are tried


@dataclass(frozen=True)
class Block:
    """A fenced block: its language in lower case, or the empty text, and its lines without the indentation of the fence."""

    language: str
    code: str


def blocks(text: str, documents: bool = True) -> list[Block]:
    """The fenced blocks of a text in order: ``` or ~~~, in lists, quotes and tags, behind words of the same line, and a last one that is
    not closed.

    A text that begins inside a block, since its prompt opened one, has that block first. Of the lines that may close a block of Python
    the first is taken with which it parses, so that a fence in a docstring closes nothing. `documents`: of a block that is Markdown those
    inside are taken.
    """
    lines = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found: list[Block] = []
    number = 0
    while number < len(lines):
        opening, inline = _OPENING.match(lines[number]), _INLINE.search(lines[number])
        if inline and inline["code"].strip():
            found.append(Block("", inline["code"].strip() + "\n"))
            number += 1
        elif opening and not found and not opening["after"].strip() and _is_code("\n".join(lines[:number])):
            found.append(Block("python", "\n".join(lines[:number]) + "\n"))
            number += 1
        elif opening:
            block, number = _block(opening, lines, number + 1)
            found += blocks(block.code, False) if documents and block.language in _DOCUMENTS else [block]
        else:
            number += 1
    return found


def _block(opening: re.Match[str], lines: list[str], start: int) -> tuple[Block, int]:
    """The block that a line opens, and the number of the line after it."""
    language = (opening["after"].split() or [""])[0].lower().strip("{}.")
    rest = opening["after"].strip().partition(" ")[2].strip()
    first = [rest] if _CODE.match(rest) else []
    prefix = _PREFIX.match(opening["before"] or opening["prefix"] or "")
    width = len(prefix[0]) if prefix else 0
    code, after, tried = None, len(lines), 0
    for number in range(start, len(lines)):
        kept = _closing(lines[number], opening["mark"] or opening["tildes"])
        if kept is None:
            continue
        inside = _unindented(first + lines[start:number] + ([kept] if kept.strip() else []), width)
        tried += 1
        if parses(inside) or language not in _PYTHON:
            return Block(language, inside), number + 1
        if code is None:
            code, after = inside, number + 1
        if tried == MAX_CLOSINGS:
            break
    return Block(language, _unindented(first + lines[start:], width) if code is None else code), after


def _closing(line: str, mark: str) -> str | None:
    """What a line says before the mark that may close a block; None where it has none."""
    match = re.match(rf"^(?P<before>.*?){re.escape(mark[0])}{{{len(mark)},}}(?P<after>.*)$", line)
    if match is None or mark[0] in match["after"]:
        return None
    empty = not match["before"].strip(" \t>")
    after = match["after"]
    closes = not after.strip() or after.startswith("</") or (empty and after[0] in " \t.,;:" and not after.strip().isalnum())
    return ("" if empty else match["before"]) if closes else None


def _unindented(lines: list[str], width: int) -> str:
    """The lines of a block without the quote marks or the indentation of its fence, where all of them have it."""
    filled = [line for line in lines if line.strip()]
    if filled and all(line.lstrip().startswith(">") for line in filled):
        lines = [re.sub(r"^[ \t]*> ?", "", line) for line in lines]
    elif width and all(not line[:width].strip() for line in filled):
        tabs = filled and all(line.startswith("\t") for line in filled)
        lines = textwrap.dedent("\n".join(lines)).split("\n") if tabs else [line[width:] for line in lines]
    code = "\n".join(lines) + "\n" if lines else ""
    dedented = textwrap.dedent(code)
    last = parsed(dedented).body[-1:] if not is_python(code) and is_python(dedented) else []
    return dedented if last and isinstance(last[0], ast.FunctionDef | ast.ClassDef) else code


def _is_code(text: str) -> bool:
    """Whether a text is Python and more than words that happen to be."""
    return parses(text) and any(
        not isinstance(node, ast.Expr | ast.AnnAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        for node in parsed(textwrap.dedent(text)).body
    )


def text_of(prompt: Prompt | None) -> str:
    """A prompt's text: chat messages one after the other, of content in parts the text parts."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    contents = [message.get("content") or "" for message in prompt]
    parts = [[part.get("text") or "" for part in content] if isinstance(content, list) else [str(content)] for content in contents]
    return "\n".join(text for texts in parts for text in texts)


@lru_cache(maxsize=64)
def parsed(code: str) -> ast.Module:
    """The tree of a program.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is none.
    """
    with warnings.catch_warnings(action="ignore"):  # of strange escapes in the program's texts
        return ast.parse(code)


@lru_cache(maxsize=256)
def parses(code: str) -> bool:
    """Whether lines are Python at any indentation; a function's body is."""
    try:
        parsed(textwrap.dedent(code))
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False


@lru_cache(maxsize=256)
def is_python(code: str) -> bool:
    """Whether it compiles, which finds a `return` outside of a function too."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "program.py", "exec")
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
