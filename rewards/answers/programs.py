"""The program of a completion, as the strongest public harnesses look for it: in the fenced block that defines what the tests call, with
the definitions of earlier blocks that it uses, or in the part of an unfenced text that is Python; and the head of the prompt that it
continues. `rewards.answers.blocks` finds the blocks.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rewards.answers.blocks import blocks, is_python, parsed, text_of
from rlhub.types import Prompt

MAX_BLOCKS = 50  # the last ones of a completion are looked at
MAX_STARTS = 20  # of a program in an unfenced text that are tried
MAX_CUTS = 50  # at errors, of the rest of such a text
INDENTATION = "    "

_START = re.compile(r"^[ \t]*(?:(?:def|class|async def|import|from)\b|@)")
_PYTHON = ("python", "python3", "py", "")
_INPUT = {"input", "open", "stdin"}
_OUTPUT = {"print", "stdout", "write"}
_KNOWN = vars(builtins).keys() | {"__name__", "__file__", "__doc__", "self"}


@dataclass(frozen=True)
class Program:
    """A program as it can be run: `head` is Python that comes before it, `code` the whole program. `fenced`: it was marked as one."""

    head: str
    code: str
    fenced: bool


def find_program(prompt: Prompt | None, completion: str, names: Sequence[str] = ()) -> Program:
    """The program of a completion.

    Args:
        prompt: source that ends in the head of a function, an instruction that holds one, or neither; or chat messages.
        names: what the tests call; without any the program is run as a script.
    """
    head = prompt_head(prompt, names)
    fenced = blocks(completion)
    python = [block for block in fenced if block.language in _PYTHON and block.code.strip()][-MAX_BLOCKS:]
    named = [block for block in python if block.language] or python
    code = _chosen([block.code for block in python], [block.code for block in named], head, names)
    if code is None:
        code = _of_text(named[-1].code if named else "" if fenced else completion, head, names)
    if code is None:
        code = named[-1].code if named else "" if fenced else completion
    return Program(_closed(head), _whole(code, head, names), bool(python))


def prompt_head(prompt: Prompt | None, names: Sequence[str] = ()) -> str:
    """The Python source of a prompt that a program may continue: all of it, or what follows an instruction; empty where there is none."""
    text = text_of(prompt)
    if not re.search(r"^[ \t]*(?:async )?(?:def|class)\b", text, re.MULTILINE):
        return text if is_python(text) and not re.fullmatch(r"[\w .]*", text) else ""
    inside = [block.code for block in blocks(text) if block.language in _PYTHON]
    for candidate in [*reversed(inside), *_suffixes(text)]:
        if is_python(_closed(candidate)) and (not names or set(names) & _defined(_closed(candidate)) or candidate == text):
            return candidate if candidate.endswith("\n") else candidate + "\n"
    return ""


def _suffixes(text: str) -> Iterable[str]:
    """A text, and what follows from each of the first lines in it that begin a program."""
    lines = text.split("\n")
    yield text
    for start in _starts(lines[1:]):
        yield "\n".join(lines[start + 1 :])


def _starts(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines) if _START.match(line)][:MAX_STARTS]


def _closed(head: str) -> str:
    """A head that can be run by itself: one that ends in the line of a `def` gets a body."""
    return head if not head.strip() or is_python(head) else f"{head.rstrip()}\n{_body_indentation(head)}pass\n"


def _body_indentation(head: str) -> str:
    last = next((line for line in reversed(head.split("\n")) if line.strip()), "")
    own = last[: len(last) - len(last.lstrip())]
    return own + INDENTATION if last.rstrip().endswith(":") else own


def _chosen(everything: list[str], named: list[str], head: str, names: Sequence[str]) -> str | None:
    """The block that defines what the tests call, else one that can be a function's body, else the last script; None without any."""
    usable = [code for code in named if is_python(code)] or [code for code in everything if is_python(code)]
    if names:
        wanted = set(names)
        for choice in (usable, [code for code in everything if is_python(code)]):
            defining = [code for code in choice if wanted & _defined(code, stubs=False)] or [
                code for code in choice if wanted & _defined(code)
            ]
            if defining:
                return _with_definitions(defining[-1], everything)
        return next((code for code in reversed(named) if head and _as_body(code, head)), None) or (usable[-1] if usable else None)
    scripts = [_with_definitions(code, everything) for code in usable]
    whole = [code for code in scripts if not _unknown(code)] or scripts
    reading, writing = ([code for code in whole if _mentions(code) & words] for words in (_INPUT, _OUTPUT))
    return next((found[-1] for found in (reading, writing, whole) if found), None)


def _with_definitions(code: str, everything: list[str]) -> str:
    """A block after those before it that define or import what it uses and does not define."""
    before = everything[: everything.index(code)] if code in everything else []
    needed = _mentions(code) - _bound(code) - _KNOWN
    parts = [code]
    for other in reversed(before):
        if is_python(other) and needed & _bound(other) and not _bound(other) & _defined(code) and not _runs(other):
            parts.insert(0, other)
            needed |= _mentions(other) - _bound(other) - _KNOWN
    return "\n".join(parts)


def _of_text(text: str, head: str, names: Sequence[str]) -> str | None:
    """The part of a text that is Python: all, a function's body, or from a definition to the last line with which it parses."""
    if is_python(text):
        return _without_words(text)
    if head and _as_body(text, head):
        return text
    lines = text.split("\n")
    for start in _starts(lines):
        code = _longest(textwrap.dedent("\n".join(lines[start:])))
        if code and not (names and not set(names) & _defined(code)):
            return _without_words(code)
    bodies = [code for whole in (_bodies(text, head) if head else ()) if (code := _longest(whole)) and _has_grown(head, code)]
    return max(bodies, key=len, default=None)


def _longest(code: str) -> str:
    """The first lines of a text that are Python, cut off where the parser finds an error; empty where there are none."""
    for _ in range(MAX_CUTS):
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(code, "program.py", "exec")
            return code if code.strip() else ""
        except SyntaxError as error:
            lines = code.split("\n")
            code = "\n".join(lines[: min(len(lines), error.lineno or 1) - 1]) + "\n"
        except (ValueError, RecursionError, MemoryError, OverflowError):
            return ""
    return ""


def _without_words(code: str) -> str:
    """A program without lines that are one word of prose, such as a last "Done"."""
    bound, lines = _bound(code) | _KNOWN, code.split("\n")
    for node in parsed(code).body:
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Name)
            and node.value.id not in bound
            and node.lineno == node.end_lineno
        ):
            lines[node.lineno - 1] = ""
    return "\n".join(lines)


def _whole(code: str, head: str, names: Sequence[str]) -> str:
    """The program with the head that it continues, where it is only the body of the head's function."""
    if names and head and not (is_python(code) and set(names) & _defined(code)):
        return _as_body(code, head) or code
    return code


def _as_body(code: str, head: str) -> str | None:
    """Head and code as one program, if the code is the body of the head's function."""
    return next((whole for whole in _bodies(code, head) if is_python(whole) and _has_grown(head, whole)), None)


def _bodies(code: str, head: str) -> list[str]:
    """Head and code as it stands, then with the indentation that the code's first line lost, then with the head's."""
    first, _, rest = code.strip("\n").partition("\n")
    if not first.strip():
        return []
    indentation = _body_indentation(head)
    depths = [line[: len(line) - len(line.lstrip())] for line in rest.split("\n") if line.strip() and line[0] in " \t"]
    lost = [f"{own}{first.lstrip()}\n{rest}" for own in (min(depths, key=len, default=indentation), indentation)]
    bodies = [code, *lost, *(textwrap.indent(textwrap.dedent(one), indentation) for one in (code, *lost))]
    return list(dict.fromkeys((head if head.endswith("\n") else head + "\n") + body.rstrip() + "\n" for body in bodies))


def _has_grown(head: str, whole: str) -> bool:
    """Whether the last function of the head has more statements in the whole than in the head alone."""
    before = _last_function(_closed(head))
    after = next(
        (node for node in ast.walk(parsed(whole)) if isinstance(node, ast.FunctionDef) and before and node.name == before.name), None
    )
    return before is None or after is None or len(after.body) > len(before.body) or not is_python(head)


def _last_function(code: str) -> ast.FunctionDef | None:
    return next((node for node in reversed(parsed(code).body) if isinstance(node, ast.FunctionDef)), None)


def _defined(code: str, stubs: bool = True) -> set[str]:
    """Names that a program defines at its top level; `stubs`: also functions without a body, such as `def total(xs): ...`."""
    names: set[str] = set()
    for node in parsed(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if stubs or not all(isinstance(line, ast.Pass) or _is_constant(line) for line in node.body):
                names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)}
    return names


def _is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound(code: str) -> set[str]:
    """Names that a program defines or imports at its top level."""
    imports = [node for node in parsed(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return _defined(code) | {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}


def _unknown(code: str) -> set[str]:
    """Names that a program reads and nothing in it can bind."""
    read, bound = set(), set(_KNOWN)
    for node in ast.walk(parsed(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            if node.name == "*":
                return set()
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
    return read - bound


def _mentions(code: str) -> set[str]:
    nodes = list(ast.walk(parsed(code)))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _runs(code: str) -> bool:
    """Whether a block does more than to define: such a one is an example of its use, or a first try."""
    quiet = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    return any(not isinstance(node, quiet) and not _is_constant(node) for node in parsed(code).body)


def called_names(tests: Iterable[str]) -> list[str]:
    """Names that statements call and do not bind, built-ins left out; what does not parse has none."""
    called: set[str] = set()
    bound: set[str] = set()
    for test in filter(is_python, tests):
        for node in ast.walk(parsed(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.add(node.name)
    return sorted(called - bound - vars(builtins).keys())
