"""`make mutants`: change one place of the code at a time, and see whether a test turns red.

The changes are cosmic-ray's operators. A sample takes places at random and one change for each, so that an expression with many possible
changes counts once; places have names, so that an edit changes the sample only where the edited lines are. Each mutant lives in the memory
of a forked process alone: no file is touched, and the tests' libraries are imported once. It meets the tests that run the changed
function, cheapest file first, which are measured once for each test file and kept in `.mutants/`, as are results: a run that was stopped
goes on, after a test was written `--again` tries what survived, and `--fresh` tries all of them once more.

Mutants that no test can see are listed with their reasons in `equivalent.yaml`, keyed by file, function and the changed lines.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".mutants"
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
SCOPE = (
    "rlhub/algorithm/*.py",
    "rlhub/objectives/*.py",
    "rlhub/views/*.py",
    "rlhub/likelihoods/*.py",
    "rlhub/advantages/*.py",
    "rlhub/training/session.py",
    "rlhub/training/*state*.py",
    "rlhub/checkpoints/sealed.py",
    "workers/learner.py",
    "workers/sync.py",
)
TESTS = ("tests/unit", "tests/golden")
SHARED = ("tests/conftest.py", "tests/helpers.py", "tests/fakes.py")  # a change of these changes what every test file runs
MARKS = "not slow and not gpu and not vllm"
# Their import takes seconds. Nothing of ours may be among them: mutants are imported after the fork.
PRELOADED = ("numpy", "scipy.stats", "torch", "pytest", "hypothesis", "safetensors.torch", "transformers", "omegaconf", "rich.console")
BUDGET_S = 120.0  # of tests for one mutant, by their measured times
PATIENCE = 6.0  # times the measured time of a file of tests, which counts as five seconds at least: its limit in time of the processor
HANG_S = 300.0  # of waiting beyond that


@dataclass(frozen=True)
class Mutant:
    """One change. `before` and `after` are the changed lines, stripped; `function` is the qualified name that holds them, or ''."""

    file: str
    function: str
    before: str
    after: str
    code: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.function, self.before, self.after


# ---------------------------------------------------------------------------------------------------------------------- changes


class _WithoutAssertions(ast.NodeTransformer):
    """Leaves out types, and `strict` of zip and `frozen` of dataclasses, which assert what holds wherever the code is right."""

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        if node.arg in ("strict", "frozen"):
            node.value = ast.Constant(True)
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return ast.Pass() if is_typing else self.generic_visit(node)


def meaning(code: str) -> str:
    """A text that is equal for programs that differ in types and assertions alone."""
    return ast.dump(_WithoutAssertions().visit(ast.parse(code)))


def functions(code: str) -> list[tuple[int, int, str]]:
    """(first line, last line, qualified name) of every function, inner ones after those that hold them."""
    found = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            name = f"{prefix}{child.name}" if is_function or isinstance(child, ast.ClassDef) else prefix
            if is_function:
                found.append((min([child.lineno, *(one.lineno for one in child.decorator_list)]), child.end_lineno, name))
            walk(child, f"{name}." if name != prefix else prefix)

    walk(ast.parse(code), "")
    return found


def function_at(spans: list[tuple[int, int, str]], line: int) -> str:
    return next((name for first, last, name in reversed(spans) if first <= line <= last), "")


def changed_lines(one: str, other: str) -> tuple[str, str]:
    """What two texts differ in, without the lines that they share at both ends."""
    left, right = one.splitlines(), other.splitlines()
    first = next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), 0)
    last = 0
    while last < min(len(left), len(right)) - first and left[-1 - last] == right[-1 - last]:
        last += 1
    return tuple(" ".join(line.strip() for line in lines[first : len(lines) - last]) for lines in (left, right))


def chance(*facts: Any) -> bytes:
    """A random rank that depends on nothing but these facts."""
    return blake2b(repr(facts).encode(), digest_size=8).digest()


def names_of_places(places: Iterable[tuple[Path, Any, Any]]) -> dict[tuple[Path, Any, Any], tuple]:
    """What places, (file, start, stop), are called: by their file, function, line and columns in it; equal ones are numbered.

    No number of a line is part of it, so that lines which are added elsewhere change no name.
    """
    names, seen = {}, Counter()
    for file in sorted({file for file, _, _ in places}):
        code = file.read_text()
        lines, spans = code.splitlines(), functions(code)
        for place in sorted(place for place in places if place[0] == file):
            _, (line, column), (last, end) = place
            text = lines[line - 1].strip()
            name = (str(file.relative_to(ROOT)), function_at(spans, line), text, column - lines[line - 1].find(text), last - line, end)
            names[place] = (*name, seen[name])
            seen[name] += 1
    return names


def sample(files: Iterable[Path], count: int, seed: int) -> Iterator[Mutant]:
    """Mutants of `count` random places, or of all."""
    operators = [get_operator(name)() for name in operator_names() if name != "core/NoOp" and not get_operator(name).arguments()]
    places: dict[tuple[Path, Any, Any], list[tuple[Any, int]]] = defaultdict(list)
    for file in sorted(files):
        nodes = list(ast_nodes(get_ast(file.read_text())))
        for operator in operators:
            found = (position for node in nodes for position in operator.mutation_positions(node))
            for occurrence, (start, stop) in enumerate(found):
                places[file, start, stop].append((operator, occurrence))
    names, made = names_of_places(places), 0
    for place in sorted(places, key=lambda place: chance(seed, names[place])):
        if made == count:
            return
        source = place[0].read_text()
        ranked = [(chance(seed, names[place], number), change) for number, change in enumerate(places[place])]
        for _, (operator, occurrence) in sorted(ranked, key=lambda one: one[0]):
            code = MutationVisitor.mutate_code(source, operator, occurrence)
            if code is not None and is_another_program(code, source):
                before, after = changed_lines(source, code)
                function = function_at(functions(source), place[1][0])
                yield Mutant(str(place[0].relative_to(ROOT)), function, before, after, code)
                made += 1
                break


def is_another_program(code: str, source: str) -> bool:
    """Not what differs in types alone, nor what does not compile or Python warns of (`is` with a literal)."""
    try:
        with warnings.catch_warnings(action="error"):
            compile(code, "mutant", "exec")
        return meaning(code) != meaning(source)
    except (SyntaxError, SyntaxWarning):
        return False


# ------------------------------------------------------------------------------------------------------------------ measurement


class _Recorder:
    """A pytest plugin: how long each test takes, and under its name the lines that it runs."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds = coverage, defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(f"{nodeid}|setup")

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.seconds.pop(report.nodeid)
        following = {"setup": "call", "call": "teardown"}.get(report.when)
        if following:
            self.coverage.switch_context(f"{report.nodeid}|{following}")


def measure(test_file: Path, files: list[Path]) -> dict[str, Any]:
    """For each passing test of a file its seconds and the functions of `files` that it runs, as `file::name`.

    What runs while fixtures are set up counts for every test of the file, since they may share it.
    """
    import pytest
    from coverage import Coverage

    coverage = Coverage(data_file=None, include=[str(file) for file in files])
    recorder = _Recorder(coverage)
    coverage.start()
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", MARKS, str(test_file)], plugins=[recorder])
    coverage.stop()
    data, shared, own = coverage.get_data(), set(), defaultdict(set)
    for file in data.measured_files():
        spans, name = functions(Path(file).read_text()), Path(file).relative_to(ROOT)
        for line, contexts in data.contexts_by_lineno(file).items():
            function = function_at(spans, line)
            for context in filter(None, contexts):
                nodeid, _, part = context.rpartition("|")
                (shared if part == "setup" else own[nodeid]).add(f"{name}::{function}")
    return {nodeid: {"seconds": seconds, "runs": sorted(own[nodeid] | shared)} for nodeid, seconds in recorder.seconds.items()}


def measured(files: list[Path], test_files: list[Path]) -> dict[str, dict[str, Any]]:
    """What `measure` says of all test files: from `.mutants/` where they have not changed since."""
    kept, part = KEPT / "measured.json", KEPT / "part.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    shared = b"".join((ROOT / name).read_bytes() for name in SHARED if (ROOT / name).exists())
    tests: dict[str, dict[str, Any]] = {}
    for number, test_file in enumerate(test_files):
        name, digest = str(test_file.relative_to(ROOT)), blake2b(test_file.read_bytes() + shared, digest_size=8).hexdigest()
        if known.get(name, {}).get("digest") != digest:
            print(f"measuring {name} ({number + 1} of {len(test_files)})", flush=True)
            part.unlink(missing_ok=True)
            os.waitpid(fork(lambda one=test_file: part.write_text(json.dumps(measure(one, files))) and 0), 0)
            known[name] = {"digest": digest, "tests": json.loads(part.read_text()) if part.exists() else {}}
            kept.write_text(json.dumps(known))
        tests |= known[name]["tests"]
    return tests


def guards(mutant: Mutant, tests: dict[str, dict[str, Any]]) -> tuple[list[str], float]:
    """The tests that run the changed function, cheapest file first and in it cheapest test first, within the budget; and their seconds.

    For what runs at import these are the tests that run anything of its file.
    """
    target = f"{mutant.file}::{mutant.function}"
    of_file: dict[str, list[str]] = defaultdict(list)
    for nodeid, facts in tests.items():
        if any(run == target if mutant.function else run.startswith(target) for run in facts["runs"]):
            of_file[nodeid.partition("::")[0]].append(nodeid)
    if not of_file and mutant.function:
        return guards(Mutant(mutant.file, "", mutant.before, mutant.after, mutant.code), tests)
    chosen, total = [], 0.0
    for nodeids in sorted(of_file.values(), key=lambda nodeids: sum(tests[nodeid]["seconds"] for nodeid in nodeids)):
        for nodeid in sorted(nodeids, key=lambda nodeid: tests[nodeid]["seconds"]):
            if not chosen or total + tests[nodeid]["seconds"] <= BUDGET_S:
                chosen.append(nodeid)
                total += tests[nodeid]["seconds"]
    return chosen, total


# -------------------------------------------------------------------------------------------------------------------- execution


class _InMemory(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a text instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self.file, self.code = str(ROOT / mutant.file), mutant.code
        self.name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        folders = [str(Path(self.file).parent)] if self.file.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(name, self.file, loader=self, submodule_search_locations=folders)

    def get_filename(self, name: str) -> str:
        return self.file

    def get_data(self, path: str) -> bytes:
        return self.code.encode()

    def path_stats(self, path: str) -> Any:
        raise OSError  # so that no compiled file is looked for


def fork(work: Any) -> int:
    """The id of a new process, leader of its group and silent, that ends with what `work` returns."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        status = int(work())
    finally:
        os._exit(status)


def test(mutant: Mutant, nodeids: list[str], tests: dict[str, dict[str, Any]]) -> int:
    """pytest's exit status of the first file of tests that fails, else 0.

    SIGXCPU ends a file that computes too long. Time of the processor does not depend on what else the machine does.
    """
    import pytest

    sys.meta_path.insert(0, _InMemory(mutant))
    for _, group in groupby(nodeids, key=lambda nodeid: nodeid.partition("::")[0]):
        chosen = list(group)
        limit = time.process_time() + PATIENCE * max(5.0, sum(tests[nodeid]["seconds"] for nodeid in chosen))
        resource.setrlimit(resource.RLIMIT_CPU, (round(limit), resource.getrlimit(resource.RLIMIT_CPU)[1]))
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout", "0", *chosen])
        if status:
            return status
    return 0


def run(mutants: Iterable[Mutant], tests: dict[str, dict[str, Any]], jobs: int) -> Iterator[tuple[Mutant, str, float]]:
    """(mutant, outcome, seconds) as they end; outcomes are killed, timeout, survived and untested."""
    waiting, running = list(reversed(list(mutants))), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            nodeids, seconds = guards(mutant, tests)
            if not nodeids:
                yield mutant, "untested", 0.0
                continue
            pid = fork(lambda mutant=mutant, nodeids=nodeids: test(mutant, nodeids, tests))
            running[pid] = mutant, time.monotonic(), HANG_S + PATIENCE * seconds
        for pid, (mutant, began, patience) in list(running.items()):
            spent = time.monotonic() - began
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and spent < patience:
                continue
            if not ended:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            code = os.waitstatus_to_exitcode(status)
            timeout = not ended or code == -signal.SIGXCPU
            yield mutant, "timeout" if timeout else "survived" if code == 0 else "killed", spent
        time.sleep(0.05)


# ----------------------------------------------------------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300, help="places that are changed")
    parser.add_argument("--seed", type=int, default=0, help="which places")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--only", default="", help="files whose path has this in it")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="folders or files of tests")
    parser.add_argument("--fresh", action="store_true", help="forget all results, though not the measured times, and begin again")
    parser.add_argument("--again", action="store_true", help="try what survived before once more")
    parser.add_argument("--control", action="store_true", help="run the tests of every file unchanged: nothing may be killed")
    parser.add_argument("--at-least", type=float, default=0.95, help="share that must be killed")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    KEPT.mkdir(exist_ok=True)
    for name in PRELOADED:
        importlib.import_module(name)
    files = [file for pattern in SCOPE for file in ROOT.glob(pattern)]
    places = [ROOT / place for place in options.tests]
    test_files = sorted(file for place in places for file in ([place] if place.is_file() else place.rglob("test_*.py")))
    tests = measured(files, test_files)
    equivalent = {(one["file"], one["function"], one["before"], one["after"]) for one in yaml.safe_load(EQUIVALENT.read_text()) or []}
    files = [file for file in files if options.only in str(file)]
    if options.control:
        return control(files, tests, options.jobs)
    mutants = list(sample(files, options.sample, options.seed))
    log = KEPT / "results.jsonl"
    if options.fresh:
        log.unlink(missing_ok=True)
    known = {tuple(row["key"]): row["outcome"] for row in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    if options.again:
        known = {key: outcome for key, outcome in known.items() if outcome not in ("survived", "untested")}
    waiting = [mutant for mutant in mutants if mutant.key not in known and mutant.key not in equivalent]
    began = time.monotonic()
    with log.open("a") as handle:
        for number, (mutant, outcome, seconds) in enumerate(run(waiting, tests, options.jobs), 1):
            known[mutant.key] = outcome
            handle.write(json.dumps({"key": mutant.key, "outcome": outcome, "seconds": round(seconds, 1)}) + "\n")
            handle.flush()
            print(f"{number} of {len(waiting)}  {outcome:9}{seconds:6.1f} s  {mutant.file} {mutant.function}: {mutant.after}", flush=True)
    return report(mutants, known, equivalent, options.at_least, time.monotonic() - began)


def control(files: list[Path], tests: dict[str, dict[str, Any]], jobs: int) -> int:
    """Print what becomes of unchanged files, none of which may be killed."""
    unchanged = [Mutant(str(file.relative_to(ROOT)), "", "", "", file.read_text()) for file in files]
    outcomes = []
    for mutant, outcome, seconds in run(unchanged, tests, jobs):
        print(f"{outcome:9}{seconds:6.1f} s  {mutant.file}", flush=True)
        outcomes.append(outcome)
    return int(not {"killed", "timeout"}.isdisjoint(outcomes))


def report(mutants: list[Mutant], known: dict, equivalent: set, at_least: float, seconds: float) -> int:
    """Print what survived and the share that was killed; 1 where that is too low."""
    counted = [mutant for mutant in mutants if mutant.key not in equivalent]
    alive = [mutant for mutant in counted if known[mutant.key] in ("survived", "untested")]
    for mutant in alive:
        print(f"\n{known[mutant.key]}: {mutant.file} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}")
    share = 1 - len(alive) / max(len(counted), 1)
    num_killed, num_equivalent = len(counted) - len(alive), len(mutants) - len(counted)
    num_timeouts = sum(known[mutant.key] == "timeout" for mutant in counted)
    killed = f"{num_killed} of {len(counted)} mutants killed ({share:.1%}; {num_timeouts} of them ran out of time)"
    print(f"\n{killed}, {num_equivalent} equivalent, {seconds:.0f} s")
    return int(share < at_least)


if __name__ == "__main__":
    sys.exit(main())
