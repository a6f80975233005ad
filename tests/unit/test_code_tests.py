"""The code reward: HumanEval, MBPP-style and stdin/stdout tasks, graded as running the tests directly would, but out of reach."""

import ast
import gzip
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_files import DATA, needs_data
from sandbox_makers import maker  # noqa: F401

from rewards import load_grader
from rewards.answers.blocks import blocks
from rewards.answers.programs import find_program
from rewards.sandbox.inside.values import decode, encode

HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"
ADD = {
    "prompt": "def add(a, b):\n    '''The sum.'''\n",
    "entry_point": "add",
    "test": (
        "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0.5, 1) == 1.5, 'half'\n"
        "    assert candidate([1], []) == [1]\n"
    ),
}
MBPP = {
    "test_list": ["assert total([1, 2]) == 3", "assert set(pairs(2)) == set([(0, 1)])", "assert sum((total([]), 1)) == 1"],
    "test_setup_code": "",
}
TOTAL = "def total(values): return sum(values)\ndef pairs(n): return [(0, 1)]\n"
SUMS = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9"}, {"input": "x", "output": "error"}]}


def graded(completion, row, **options):
    return load_grader({"name": "code_tests", "deadline_seconds": 10.0, **options})("", completion, row)


@pytest.mark.parametrize(
    ("completion", "value", "status", "detail"),
    [
        ("    return a + b\n", 1.0, "ok", "all 3 tests passed"),
        ("def add(a, b):\n    return a + b\n", 1.0, "ok", "all 3"),
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0, "ok", "all 3"),
        ("```python\n    return a + b\n```", 1.0, "ok", "all 3"),
        (
            "```python\ndef add(a, b): return 0\n```\nNo, rather\n```py\nfrom __future__ import annotations\ndef add(a, b): return a + b",
            1.0,
            "ok",
            "all 3",
        ),
        ("    return 3\n", 0.0, "ok", "test 2 of 3 failed"),
        ("    return a - b\n", 0.0, "ok", "test 1 of 3 failed"),
        ("    return a / 0\n", 0.0, "ok", "test 1 of 3: ZeroDivisionError: division by zero"),
        ("```python\ndef sub(a, b): return a\n```", 0.0, "ok", "test 1 of 3 failed"),
        ("```python\ndef add(a, b) return a\n```", 0.0, "ok", "SyntaxError"),
        ("raise ValueError('no')", 0.0, "ok", "test 1 of 3: ValueError: no"),
        ("```python\ndef add(a, b): return a + b\nraise ValueError('no')\n```", 0.0, "ok", "the program does not load: ValueError: no"),
        ("I do not know.", 0.0, "unparsed", "no program"),
        ("", 0.0, "unparsed", "no program"),
        ("```python\n```", 0.0, "unparsed", "no program"),
    ],
)
def test_humaneval_style(completion, value, status, detail):
    result = graded(completion, ADD)
    assert (result.value, result.status) == (value, status) and detail in result.detail, result


def test_the_time_limit_is_a_grade():
    result = graded("    while True: pass", ADD, deadline_seconds=0.5)
    assert (result.value, result.status, result.detail) == (0.0, "ok", "time limit of 0.5 s")


@pytest.mark.parametrize(
    ("row", "completion", "share"),
    [
        (ADD, "    return 3", 1 / 3),
        (ADD, "    return a + b", 1.0),
        (ADD, "    return 0", 0.0),
        (ADD, "    if a == [1]:\n        while True: pass\n    return a + b", 2 / 3),
        (MBPP, "def total(values): return 3\ndef pairs(n): return [(0, 1)]", 2 / 3),
        (SUMS, "print(sum(map(int, input().split())))", 2 / 3),
    ],
)
def test_partial_credit_is_the_share_of_tests(row, completion, share):
    result = graded(completion, row, partial=True, deadline_seconds=3.0)
    assert result.value == pytest.approx(share) and result.status == "ok"


def test_mbpp_style():
    assert graded(TOTAL, MBPP).value == 1.0
    assert graded("def total(values): return sum(values)", MBPP).detail == "the program does not define pairs"
    assert graded("set = lambda x: 0\nsum = lambda x: 3\n" + TOTAL, MBPP).detail == "test 3 of 3 failed"  # the tests' own set and sum
    reference = {"test_list": ["assert sum(10, 15) == 6"], "code": "import math\ndef sum(a, b): return 6"}
    assert graded("def sum(a, b): return 6", reference).value == 1.0  # the task's function has a built-in's name
    close = {"test_list": ["assert math.isclose(half(3), 1.5)"]}
    forged = "class math:\n    isclose = staticmethod(lambda a, b: True)\n"
    assert graded("def half(x): return x / 2", close).value == 1.0
    assert graded(forged + "def half(x): return 0", close).value == 0.0
    linked = {
        "test_list": ["assert depth(root) == 2", "assert isinstance(root.left.value, int)"],
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
    }
    tree = (
        "class Node:\n    def __init__(self, v): self.value, self.left = v, None\n"
        "def depth(n): return 0 if n is None else 1 + depth(n.left)"
    )
    assert graded(tree, linked).value == 1.0


def test_stdin_and_stdout():
    program = "try: print(sum(map(int, input().split())), '  ')\nexcept ValueError: print('error')\nprint()"
    assert graded(program, SUMS).value == 1.0
    assert graded("print(3)", SUMS).detail == "test 2 of 3: other output"
    result = graded("print(sum(map(int, input().split())))", SUMS)
    assert result.value == 0.0 and "test 3 of 3: ended with code 1, ValueError" in result.detail


def test_in_place_functions_change_the_tests_argument_and_others_do_not():
    check = "def check(candidate):\n    numbers = [3, 1, 2]\n    assert candidate(numbers) == {expected}\n    assert numbers == {after}\n"
    row = {"prompt": "", "entry_point": "order"}
    in_place = {**row, "test": check.format(expected=None, after=[1, 2, 3])}
    assert graded("def order(numbers): numbers.sort()", in_place).value == 1.0
    by_value = {**row, "test": check.format(expected=[1, 2, 3], after=[3, 1, 2])}
    assert graded("def order(numbers): numbers.sort(); return numbers", by_value).value == 1.0


def test_tests_without_an_assert():
    row = {"prompt": "", "entry_point": "add", "test": "def check(candidate):\n    if candidate(1, 2) != 3: raise ValueError('sum')\n"}
    assert graded("def add(a, b): return a + b", row).value == graded("def add(a, b): return a + b", row, partial=True).value == 1.0
    wrong = graded("def add(a, b): return a", row)
    assert wrong.value == 0.0 and wrong.detail == "line 2 of the tests: ValueError: sum"


def test_errors_cross_as_their_built_in_kind():
    check = (
        "def check(candidate):\n    try:\n        candidate(-1)\n        assert False\n"
        "    except ValueError as error:\n        assert 'low' in str(error)\n"
    )
    row = {"prompt": "", "entry_point": "root", "test": check}
    assert graded("class Low(ValueError): pass\ndef root(x): raise Low('too low')", row).value == 1.0
    assert graded("def root(x): raise TypeError('too low')", row).value == 0.0
    assert graded("def root(x): raise SystemExit('too low')", row).value == 0.0


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"answer": 1}, "needs a column test, test_list, test_cases, tests or input_output"),
        ({"test": "def check(c): pass"}, "entry_point"),
        ({**ADD, "test": "def check(candidate) assert"}, "the tests cannot be run: SyntaxError"),
        ({**ADD, "test": "x = 1"}, "neither JSON nor assert statements"),
        ({**ADD, "test": "def check(candidate):\n    assert candidate(print, 1) == 2"}, "pass a builtin_function_or_method"),
        ({"tests": []}, "is empty"),
        ({"test_list": ["assert 1 == 1"]}, "call nothing of the program"),
    ],
)
def test_unusable_tests_are_rejected_and_not_a_grade(row, cause):
    result = graded("def add(a, b): return a", row)
    assert result.status == "rejected" and cause in result.detail and result.value != result.value


@pytest.mark.parametrize(
    "source",
    [
        "return '[' * 3_000_000",
        "return ['x' * 1000] * 10_000",
        "x = []\n    for _ in range(10**5): x = [x]\n    return x",
        "x = []; x.append(x)\n    return x",
        "import os\n    while True: os.write(5, b'[' * 60_000 + b'\\n')",
        "import os\n    while True: os.write(5, b'[' * 60_000)",
        'import os\n    os.write(5, b\'{"value": ["object", {}]}\\n\')',
        'import os\n    os.write(5, b\'{"error": ["SystemExit"], "text": "0"}\\n\')\n    return 3',
        "import os\n    os.close(5)",
        "return 10 ** 100_000",
        "return float('nan')",
        "return '\\ud800'",
    ],
)
def test_strange_answers_are_graded_as_wrong(source):
    result = graded(f"def add(a, b):\n    {source}", ADD)
    assert (result.value, result.status) == (0.0, "ok"), result


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -1,
        2**70,
        10**5000,
        0.1,
        float("inf"),
        "aé\n\ud800",
        1 + 2j,
        b"\x00\xff",
        [],
        (1, [2, (3,)]),
        {1, (2, 3)},
        frozenset({1}),
        {"a": {(1, 2): None}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_cross_unchanged(value):
    back = decode(json.loads(json.dumps(encode(value, id))), id)
    assert back == value and type(back) is type(value)


def test_the_weak_sandbox_grades_alike():
    assert graded("    return a + b", ADD, sandbox="weak").value == 1.0
    assert graded("    return a", ADD, sandbox="weak").value == 0.0
    assert graded("    while True: pass", ADD, sandbox="weak", deadline_seconds=0.5).detail == "time limit of 0.5 s"


def test_several_threads_may_grade_at_once():
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda n: graded("    return a + b" if n % 2 else "    return a", ADD).value, range(8)))
    assert values == [0.0, 1.0] * 4


def test_extraction_takes_the_last_block_of_python():
    assert find_program("", "x = 1").code == "x = 1"
    assert find_program("", "```\nx = 1\n```").code == "x = 1\n"
    assert find_program("", "```python\nx = 1\n```\n```bash\nls\n```").code == "x = 1\n"
    assert find_program("", "```Python\r\nx = 1\n```\n```py\nx = 2").code == "x = 2\n"
    assert [block.language for block in blocks("```py\n1\n```\n~~~ruby\n```\n~~~")] == ["py", "ruby"]


def humaneval():
    with gzip.open(HUMANEVAL, "rt") as file:
        return [json.loads(line) for line in file]


class Mutant(ast.NodeTransformer):
    """Changes one place of a program: a comparison, an operator, a constant, or a returned value."""

    SWAPS = {  # noqa: RUF012
        ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
        ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
        ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    }  # fmt: skip

    def __init__(self, place: int) -> None:
        self.place, self.seen = place, 0

    def generic_visit(self, node):
        node = super().generic_visit(node)
        swap = self.SWAPS.get(type(node))
        number = isinstance(node, ast.Constant) and type(node.value) is int
        returned = isinstance(node, ast.Return) and node.value is not None
        if swap or number or returned:
            self.seen += 1
            if self.seen == self.place:
                if swap:
                    return swap()
                if number:
                    return ast.copy_location(ast.Constant(node.value + 1), node)
                return ast.copy_location(ast.Return(ast.Constant(None)), node)
        return node


def mutants(row, count, seed=0):
    """Programs that differ from the canonical one in one place."""
    source = row["prompt"] + row["canonical_solution"]
    counter = Mutant(0)
    counter.visit(ast.parse(source))
    places = random.Random(f"{seed} {row['task_id']}").sample(range(1, counter.seen + 1), min(count, counter.seen))
    return [ast.unparse(ast.fix_missing_locations(Mutant(place).visit(ast.parse(source)))) for place in places]


def passes_directly(program, row, seconds=10.0):
    """The official way: program and tests in one throw-away process."""
    source = f"{program}\n{row['test']}\ncheck({row['entry_point']})\n"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", source], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()


def agreement(rows, per_row):
    """Counts of (passes directly, passes in the sandbox) over mutants, after every canonical solution has passed."""
    counts = {}
    for row in rows:
        for completion in (row["canonical_solution"], f"```python\n{row['prompt'] + row['canonical_solution']}\n```"):
            result = graded(completion, row)
            assert result.value == 1.0, (row["task_id"], result)
        for mutant in mutants(row, per_row):
            result = graded(f"```python\n{mutant}\n```", row, deadline_seconds=3.0)
            key = passes_directly(mutant, row), result.value == 1.0
            assert result.status == "ok" and key != (False, True), (row["task_id"], mutant, result)
            counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("program", ["def Node(n): raise ValueError(n)", "Node = 5"])
def test_a_program_that_fails_in_the_setup_has_failed_and_does_not_pass_for_broken_tests(program):
    row = {"test_list": ["assert Node(1) is not None"], "test_setup_code": "root = Node(1)"}
    result = graded(program, row)
    assert (result.value, result.status) == (0.0, "ok") and "before the tests" in result.detail


def test_a_setup_that_fails_by_itself_is_no_grade():
    result = graded("def f(): return 1", {"test_list": ["assert f() == 1"], "test_setup_code": "x = 1 / 0"})
    assert result.status == "rejected" and "ZeroDivisionError" in result.detail


@needs_data("humaneval")
def test_humaneval_solutions_pass_and_mutants_that_fail_directly_fail_here_sample():
    rows = humaneval()
    sample = [*rows[::16], rows[32], rows[38], rows[50]]  # these three have helpers in the prompt that the tests use
    counts = agreement(sample, per_row=2)
    assert counts[False, False] >= len(sample) and (True, False) not in counts


@pytest.mark.slow
@needs_data("humaneval")
def test_humaneval_solutions_pass_and_mutants_that_fail_directly_fail_here():
    counts = agreement(humaneval(), per_row=3)
    print({f"directly {a}, here {b}": count for (a, b), count in counts.items()})
    assert counts[False, False] >= 164 and (True, False) not in counts
