"""The program of a completion, as the strongest public harnesses look for it: in the fenced block that defines what the tests call, with
the definitions of earlier blocks that it uses, or in the part of an unfenced text that is Python; and the head of the prompt that it
continues.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhub.types import Prompt

MAX_TRIMMED = 200  # lines that may be cut off an unfenced text
MAX_STARTS = 20  # of a program in an unfenced text that are tried
INDENTATION = "    "

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<before>(?:[^`~\n]*[^`~\s][ \t]*)?)(?P<mark>`{3,}|~{3,})(?P<after>[^`\n]*)$")
_START = re.compile(r"^[ \t]*(?:(?:def|class|async def|import|from)\b|@)")
_PYTHON = ("python", "python3", "py", "")
_OUTPUT = {"print", "input", "open", "stdout", "stdin", "write"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language in lower case, or the empty text, and its lines without the indentation of the fence."""

    language: str
    code: str


@dataclass(frozen=True)
class Program:
    """A program as it can be run: `head` is Python that comes before it, `code` the whole program. `fenced`: it was marked as one."""

    head: str
    code: str
    fenced: bool


def find_program(prompt: Prompt, completion: str, names: Sequence[str] = ()) -> Program:
    """The program of a completion.

    Args:
        prompt: source that ends in the head of a function, an instruction that holds one, or neither; or chat messages.
        names: what the tests call; without any the program is run as a script.
    """
    head = prompt_head(prompt, names)
    fenced = blocks(completion)
    python = [block for block in fenced if block.language in _PYTHON and block.code.strip()]
    named = [block for block in python if block.language] or python
    code = _chosen([block.code for block in python], [block.code for block in named], head, names)
    if code is None and not python:
        code = _of_text(completion, head, names)
    if code is None:
        code = named[-1].code if named else "" if fenced else completion
    return Program(_closed(head), _whole(code, head, names), bool(python))


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text in order: ``` or ~~~, in lists, behind words of the same line, and a last one that is not closed.

    A text that begins inside a block, since its prompt opened one, has that block first.
    """
    found: list[Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        fence = _FENCE.match(line)
        if (
            fence
            and opened is None
            and not fence["after"].strip()
            and not found
            and _is_python("\n".join(lines))
            and "\n".join(lines).strip()
        ):
            found.append(Block("python", "\n".join(lines) + "\n"))
            lines = []
        elif fence and opened is None:
            opened, lines = fence, []
        elif fence and opened and fence["mark"][0] == opened["mark"][0] and not fence["after"].strip() and not fence["before"]:
            found.append(_block(opened, lines))
            opened, lines = None, []
        else:
            lines.append(line)
    if opened:
        found.append(_block(opened, lines))
    return found


def _block(opened: re.Match[str], lines: list[str]) -> Block:
    language = (opened["after"].split() or [""])[0].lower().strip("{}.")
    code = "\n".join(lines) + "\n" if lines else ""
    indent = opened["indent"]
    if indent and all(line.startswith(indent) or not line.strip() for line in lines):
        code = "".join(line.removeprefix(indent) + "\n" for line in lines)
    return Block(language, code)


def prompt_head(prompt: Prompt, names: Sequence[str] = ()) -> str:
    """The Python source of a prompt that a program may continue: all of it, or what follows an instruction; empty where there is none."""
    text = prompt if isinstance(prompt, str) else "\n".join(str(message.get("content") or "") for message in prompt)
    if not re.search(r"^[ \t]*(?:async )?(?:def|class)\b", text, re.MULTILINE):
        return text if _is_python(text) and not re.fullmatch(r"[\w .]*", text) else ""
    inside = [block.code for block in blocks(text) if block.language in _PYTHON]
    for candidate in [*reversed(inside), *_suffixes(text)]:
        if _is_python(_closed(candidate)) and (not names or set(names) & _defined(_closed(candidate)) or candidate == text):
            return candidate if candidate.endswith("\n") else candidate + "\n"
    return ""


def _suffixes(text: str) -> Iterable[str]:
    lines = text.split("\n")
    yield text
    for number, line in enumerate(lines):
        if number and _START.match(line):
            yield "\n".join(lines[number:])


def _closed(head: str) -> str:
    """A head that can be run by itself: one that ends in the line of a `def` gets a body."""
    return head if not head.strip() or _is_python(head) else f"{head.rstrip()}\n{_body_indentation(head)}pass\n"


def _body_indentation(head: str) -> str:
    last = next((line for line in reversed(head.split("\n")) if line.strip()), "")
    own = last[: len(last) - len(last.lstrip())]
    return own + INDENTATION if last.rstrip().endswith(":") else own


def _chosen(everything: list[str], named: list[str], head: str, names: Sequence[str]) -> str | None:
    """The block that defines what the tests call, else one that can be a function's body, else the last script; None without any."""
    usable = [code for code in named if _is_python(code)] or [code for code in everything if _is_python(code)]
    if names:
        defining = [code for code in usable if set(names) & _defined(code)] or [
            code for code in everything if _is_python(code) and set(names) & _defined(code)
        ]
        if defining:
            return _with_definitions(defining[-1], everything)
        return next((code for code in reversed(named) if head and _as_body(code, head)), None) or (usable[-1] if usable else None)
    scripts = [code for code in usable if _mentions(code) & _OUTPUT] or usable
    return _with_definitions(scripts[-1], everything) if scripts else None


def _with_definitions(code: str, everything: list[str]) -> str:
    """A block after those before it that define or import what it uses and does not define."""
    before = everything[: everything.index(code)] if code in everything else []
    needed = _mentions(code) - _defined(code) - vars(builtins).keys()
    parts = [code]
    for other in reversed(before):
        if _is_python(other) and needed & _defined(other) and not _defined(other) & _defined(code) and not _runs(other):
            parts.insert(0, other)
            needed |= _mentions(other) - _defined(other) - vars(builtins).keys()
    return "\n".join(parts)


def _of_text(text: str, head: str, names: Sequence[str]) -> str | None:
    """The part of an unfenced text that is Python: all, a function's body, or from a definition to the last line with which it parses."""
    if _is_python(text) or (head and _as_body(text, head)):
        return text
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if _START.match(line)][:MAX_STARTS]
    for start in starts:
        for end in range(len(lines), max(start, len(lines) - MAX_TRIMMED), -1):
            code = textwrap.dedent("\n".join(lines[start:end]))
            if _is_python(code) and (not names or set(names) & _defined(code)):
                return code + "\n"
    for end in range(len(lines) - 1, max(0, len(lines) - MAX_TRIMMED), -1):
        body = "\n".join(lines[:end])
        if head and body.strip() and _as_body(body, head):
            return body
    return None


def _whole(code: str, head: str, names: Sequence[str]) -> str:
    """The program with the head that it continues, where it is only the body of the head's function."""
    if names and head and not (_is_python(code) and set(names) & _defined(code)):
        return _as_body(code, head) or code
    return code


def _as_body(code: str, head: str) -> str | None:
    """Head and code as one program, if the code is a body as it stands, without its first line's indentation, or without any."""
    first, _, rest = code.lstrip("\n").partition("\n")
    indentation = _body_indentation(head)
    own = next((line[: len(line) - len(line.lstrip())] for line in rest.split("\n") if line.strip() and line[0] in " \t"), indentation)
    for body in (code, f"{own}{first.lstrip()}\n{rest}", textwrap.indent(code, indentation)):
        whole = (head if head.endswith("\n") else head + "\n") + body
        if first.strip() and _is_python(whole) and _has_grown(head, whole):
            return whole
    return None


def _has_grown(head: str, whole: str) -> bool:
    """Whether the last function of the head has more statements in the whole than in the head alone."""
    functions = [_last_function(_closed(head)), _last_function_named(whole, _last_function(_closed(head)))]
    if not all(functions):
        return True
    return len(functions[1].body) > len(functions[0].body) or not _is_python(head)  # type: ignore[union-attr]


def _last_function(code: str) -> ast.FunctionDef | None:
    return next((node for node in reversed(_parsed(code).body) if isinstance(node, ast.FunctionDef)), None)


def _last_function_named(code: str, like: ast.FunctionDef | None) -> ast.FunctionDef | None:
    own = [node for node in ast.walk(_parsed(code)) if isinstance(node, ast.FunctionDef) and like and node.name == like.name]
    return own[0] if own else None


def _parsed(code: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # of strange escapes in the program's texts
        return ast.parse(code)


def _is_python(code: str) -> bool:
    """Whether it compiles, which finds a `return` outside of a function too."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "program.py", "exec")
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False


def _defined(code: str) -> set[str]:
    """Names that a program binds at its top level."""
    names: set[str] = set()
    for node in _parsed(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)}
    return names


def _mentions(code: str) -> set[str]:
    nodes = list(ast.walk(_parsed(code)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _runs(code: str) -> bool:
    """Whether a block does more than to define: such a one is an example of its use, or a first try."""
    quiet = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    return any(not isinstance(node, quiet) for node in _parsed(code).body)


def called_names(tests: Iterable[str]) -> list[str]:
    """Names that statements call and do not bind, built-ins left out; what does not parse has none."""
    called: set[str] = set()
    bound: set[str] = set()
    for test in tests:
        if not _is_python(test):
            continue
        for node in ast.walk(_parsed(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
    return sorted(called - bound - vars(builtins).keys())
