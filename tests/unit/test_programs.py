# ruff: noqa: E501  one case a line
"""Which program a completion holds, and which tests a row: the forms that models write and that published data have."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sandbox_makers import maker  # noqa: F401

from rewards import load_grader
from rewards.answers.programs import find_program

GRADE = load_grader({"name": "code_tests", "deadline_seconds": 10.0})
TOTAL: dict[str, Any] = {
    "prompt": 'def total(xs):\n    """Sum of the integer square roots."""\n',
    "test": "def check(candidate):\n    assert candidate([4, 9]) == 5\n    assert candidate([]) == 0\n",
    "entry_point": "total",
}
PROGRAM = "import math\ndef total(xs):\n    return sum(math.isqrt(x) for x in xs)\n"
SCRIPT = "a, b = map(int, input().split())\nprint(a + b)\n"
SUM: dict[str, Any] = {"tests": [{"input": "3 4\n", "output": "7"}]}

RIGHT: list[tuple[dict[str, Any], str]] = [
    (TOTAL, "~~~python\n" + PROGRAM + "~~~"),
    (TOTAL, "````python\n" + PROGRAM + "````"),
    (TOTAL, "```python\n" + PROGRAM),
    (TOTAL, "```Python3\n" + PROGRAM + "```\n"),
    (TOTAL, "```{python}\n" + PROGRAM + "```\n"),
    (TOTAL, '```python title="a.py"\n' + PROGRAM + "```\n"),
    (TOTAL, "- Step:\n\n    ```python\n    import math\n    def total(xs):\n        return sum(math.isqrt(x) for x in xs)\n    ```\n"),
    (TOTAL, "\t```python\n\timport math\n\tdef total(xs):\n\t    return sum(math.isqrt(x) for x in xs)\n\t```\n"),
    (TOTAL, "Here is my solution:\n\n" + PROGRAM),
    (TOTAL, "Here is my solution:\n\n" + PROGRAM + "\nThis works because of X."),
    (TOTAL, PROGRAM + "\n\nExplanation: it's simple.\nDone"),
    (TOTAL, "```python\n" + PROGRAM + "```\nUsage:\n```python\nprint(total([4, 9]))\n```"),
    (TOTAL, "```python\n" + PROGRAM + "```\nExample output:\n```\n5\n```"),
    (TOTAL, "```python\n" + PROGRAM + "```\nRun:\n```bash\npython a.py\n```"),
    (TOTAL, "```python\n" + PROGRAM + "```\n```text\nsum\n```"),
    (TOTAL, "```python\nimport math\n```\nThen\n```python\ndef total(xs):\n    return sum(math.isqrt(x) for x in xs)\n```"),
    (
        TOTAL,
        "```python\ndef root(x):\n    return int(x**.5)\n```\nThen\n```python\ndef total(xs):\n    return sum(root(x) for x in xs)\n```",
    ),
    (TOTAL, "```python\ndef total(xs):\n    return 0\n```\nWrong. Better:\n```python\n" + PROGRAM + "```"),
    (TOTAL, "    return sum(int(x**.5) for x in xs)\n"),
    (TOTAL, "return sum(int(x**.5) for x in xs)"),
    (TOTAL, "s = 0\nfor x in xs:\n    s += int(x**.5)\nreturn s"),
    (TOTAL, "```python\nreturn sum(int(x**.5) for x in xs)\n```"),
    (TOTAL, "```python\n    s = 0\n    for x in xs:\n        s += int(x**.5)\n    return s\n```"),
    (TOTAL, "s = 0\n    for x in xs:\n        s += int(x**.5)\n    return s\n\nThis is the answer."),
    ({**TOTAL, "prompt": "def total(xs: list) -> int:"}, "    return sum(int(x**.5) for x in xs)"),
    ({**TOTAL, "prompt": "def total(xs):\n"}, "return sum(int(x**.5) for x in xs)"),
    ({**TOTAL, "prompt": [{"role": "user", "content": "Write total(xs)."}]}, "```python\n" + PROGRAM + "```"),
    (
        {
            **TOTAL,
            "prompt": [{"role": "system", "content": None}, {"role": "user", "content": "Complete:\n```python\ndef total(xs):\n```"}],
        },
        "```python\n" + PROGRAM + "```",
    ),
    (
        {**TOTAL, "prompt": [{"role": "user", "content": "Complete:\n```python\ndef total(xs):\n```"}]},
        "    return sum(int(x**.5) for x in xs)",
    ),
    ({**TOTAL, "prompt": "Solve it. Don't use loops; it's \"easy\"."}, "```python\n" + PROGRAM + "```"),
    (
        {
            **TOTAL,
            "prompt": "from typing import List\n\ndef helper(x):\n    return int(x**.5)\n\ndef total(xs: List[int]) -> int:\n    '''Sum.'''\n",
        },
        "    return sum(helper(x) for x in xs)",
    ),
    ({**TOTAL, "prompt": ""}, PROGRAM),
    (
        {**TOTAL, "prompt": "Please complete the function below.\n\nimport math\n\ndef total(xs):\n    '''Doc.'''\n"},
        "    return sum(math.isqrt(x) for x in xs)",
    ),
    (TOTAL, "<think>def total</think>\n```python\n" + PROGRAM + "```"),
    (TOTAL, "```python\r\nimport math\r\ndef total(xs):\r\n    return sum(math.isqrt(x) for x in xs)\r\n```"),
    (TOTAL, "total = lambda xs: sum(int(x**.5) for x in xs)"),
    (TOTAL, "```python\nclass Solution:\n    pass\n\n" + PROGRAM + "```"),
    (TOTAL, "```python\n>>> 1\n```\n```python\n" + PROGRAM + "```"),
    (TOTAL, PROGRAM + "\nif __name__ == '__main__':\n    print(total([4]))\n    exit()\n"),
    (SUM, "```python\n" + SCRIPT + "```"),
    (SUM, "```python\n" + SCRIPT + "quit()\n```"),
    (SUM, "```python\n" + SCRIPT + "import sys; sys.exit(0)\n```"),
    (SUM, "```python\n" + SCRIPT + "exit(0)\n```"),
    (SUM, SCRIPT),
    (SUM, "```python\n" + SCRIPT + "```\nOutput:\n```\n7\n```"),
    (SUM, "```python\n" + SCRIPT + "```\nThe complexity:\n```\nO(1)\n```"),
    (SUM, "```python\n" + SCRIPT + "```\nTest:\n```python\nassert 3 + 4 == 7\n```"),
    (SUM, "```python\nimport sys\n" + SCRIPT + "sys.stdout.flush()\n```"),
    (SUM, "```\n" + SCRIPT + "```"),
    ({"tests": {"inputs": ["3 4"], "outputs": ["7"]}}, SCRIPT),
    ({"tests": '{"inputs": ["3 4"], "outputs": ["7\\n"]}'}, SCRIPT),
    ({"input_output": '{"inputs": ["3 4"], "outputs": ["7"]}'}, SCRIPT),
    ({"tests": [["3 4", "7"]]}, SCRIPT),
    ({"tests": [{"stdin": "3 4", "stdout": "7"}]}, SCRIPT),
    ({"tests": [{"input": ["3 4"], "output": [7]}]}, SCRIPT),
    ({"tests": [{"input": "3 4", "output": 7}]}, SCRIPT),
    ({"tests": ["assert total([4, 9]) == 5"]}, PROGRAM),
    ({"test_cases": ["assert total([4, 9]) == 5"], "prompt": "x"}, "```python\n" + PROGRAM + "```"),
    ({"test_cases": '["assert total([4, 9]) == 5"]'}, PROGRAM),
    ({"tests": {"fn_name": "total", "inputs": [[[4, 9]]], "outputs": [5]}}, PROGRAM),
    ({"tests": {"fn_name": "total", "inputs": [[[4, 9]]], "outputs": [[5]]}}, PROGRAM),
    (
        {"input_output": '{"fn_name": "total", "inputs": [[[4, 9]]], "outputs": [5]}'},
        "class Solution:\n    def total(self, xs):\n        return 5",
    ),
    ({"tests": [{"input": "", "output": "0.333333333333"}]}, "print(1/3)"),
    ({"tests": [{"input": "", "output": "1e-9 2.0"}]}, "print(0.000000001, 2)"),
    ({"tests": [{"input": "", "output": "0.5\n1"}]}, "print(.5)\nprint(1)\n"),
    ({"tests": [{"input": "", "output": "3.14"}]}, "print('3.1400000')"),
    ({"tests": [{"input": "", "output": "a\nb\n"}]}, "print('a ')\nprint('b')\nprint()"),
    (
        {"test_list": ["assert total([4, 9]) == 5", "assert total([]) == 0"], "prompt": "Write a function to sum integer roots."},
        "```python\n" + PROGRAM + "```",
    ),
    (
        {"test_list": ["assert total([4, 9]) == 5", "assert total([]) == 0"], "prompt": "Write a function to sum integer roots."},
        "```python\n" + PROGRAM + "```\n```python\nassert total([]) == 0\n```",
    ),
]

LISTED = "".join(f"  {line}\n" for line in PROGRAM.splitlines())
QUOTED = "".join(f"> {line}\n" for line in PROGRAM.splitlines())
RIGHT += [
    (TOTAL, completion)
    for completion in (
        f"Sure! ```python\n{PROGRAM}``` Done.",
        f"- ```python\n{LISTED}  ```\n",
        f"> ```python\n{QUOTED}> ```\n",
        f"```python\n{PROGRAM.rstrip()}```",
        "```python import math\n" + PROGRAM.partition("\n")[2] + "```",
        f"````markdown\nSo:\n```python\n{PROGRAM}```\n````",
        f"<answer>```python\n{PROGRAM}```</answer>",
        f"<answer>```python\n{PROGRAM.rstrip()}```</answer>",
        f"Solution\n```\n{PROGRAM}```\n",
        f"`total` is ```python\n{PROGRAM}```",
        f"```python\n\ufeff{PROGRAM}```",
        f'```python\n{PROGRAM}def other():\n    """\n    ```\n    total([1])\n    ```\n    """\n```',
        f"```python\n{PROGRAM}```\n```python\nfrom solution import total\nprint(total([4]))\n```",
        f"```python\n{PROGRAM}```\nThe signature:\n```python\ndef total(xs):\n    ...\n```",
        f"```python\n{PROGRAM}```\n```python\n>>> total([4])\n2\n```",
        f"```python\n{PROGRAM}exit()\n```",
        f"```python\n{PROGRAM}raise SystemExit(0)\n```",
        f"{PROGRAM}\nDone",
        "The sum is ```total = lambda xs: sum(int(x**.5) for x in xs)```.",
        "    import math\n    return sum(math.isqrt(x) for x in xs)\n```\nExplanation",
        "  s = 0\n  for x in xs:\n    s += int(x**.5)\n  return s",
        "if not xs:\n        return 0\n    return int(xs[0]**.5) + total(xs[1:])",
        "```python\ntry:\n        return sum(int(x**.5) for x in xs)\n    except TypeError:\n        return 0\n```",
        "def root(x):\n        return int(x**.5)\n    return sum(root(x) for x in xs)\n\nThat is all.",
    )
]
RIGHT += [
    ({**TOTAL, "prompt": None}, f"```python\n{PROGRAM}```"),
    (
        {**TOTAL, "prompt": [{"role": "user", "content": [{"type": "text", "text": TOTAL["prompt"]}]}]},
        "    return sum(int(x**.5) for x in xs)",
    ),
    (SUM, f"```python\nimport sys\n{SCRIPT}```\nWith a function:\n```python\ndef add(a, b):\n    return a + b\nprint(add(1, 2))\n```"),
    (SUM, "```python\ndef solve():\n    print(sum(map(int, input().split())))\n```\nand\n```python\nsolve()\n```"),
    (SUM, f"```python\n{SCRIPT}```\n```python\nsys.stdin = io.StringIO('3 4')\nsolve()\n```"),
    *[
        ({"tests": tests}, SCRIPT)
        for tests in (
            {"input": ["3 4"], "output": ["7"]},
            {"input": "3 4", "output": "7"},
            {"inputs": ["3 4"], "outputs": [7], "fn_name": None},
            ['{"input": "3 4", "output": "7"}'],
            [{"input": "3 4", "expected": "7"}],
            [{"input": "3 4", "expected_output": "7\r\n"}],
            [{"input": "3 4", "output": 7.0}],
        )
    ],
    *[
        ({column: tests}, PROGRAM)
        for column, tests in (
            ("tests", "assert total([4, 9]) == 5\nassert total([]) == 0"),
            ("test", "assert total([4, 9]) == 5"),
            ("test", ["assert total([4, 9]) == 5"]),
            ("tests", {"fn_name": "total", "inputs": ["[4, 9]"], "outputs": ["5"]}),
        )
    ],
    ({"test_list": ["assert math.isclose(total([4, 9]), 5)"], "test_imports": "import math"}, PROGRAM),
    ({"tests": [{"input": [[4, 9]], "output": 5}], "fn_name": "total"}, PROGRAM),
    ({"tests": {"inputs": [[[4, 9]]], "outputs": [5]}, "entry_point": "total"}, PROGRAM),
    ({"tests": {"fn_name": "f", "inputs": [["1"], ["x"]], "outputs": ["1", "x"]}}, "def f(x): return x"),
    (
        {"tests": {"fn_name": "f", "inputs": [[1]], "outputs": [[0.33333333, [[1, 2]], {"a": 0.3}]]}},
        "def f(x): return [x / 3, [(1, 2)], {'a': 0.1 + 0.2}]",
    ),
    *[
        ({"tests": [{"input": "", "output": wanted}]}, f"print({got})")
        for got, wanted in (
            ("2.0", "2"),
            ("-0.0", "0"),
            ("[0.1 + 0.2, 1]", "[0.3, 1]"),
            ("'0.30000000000000004,1'", "0.3,1"),
            ("float('inf')", "inf"),
        )
    ],
]

WRONG: list[tuple[dict[str, Any], str]] = [
    (TOTAL, "```python\ndef total(xs):\n    return 1\n```\n"),
    (TOTAL, "I can't."),
    (SUM, "print(8)"),
    ({"tests": [{"input": "", "output": "0.333333"}]}, "print(0.34)"),
    ({"tests": [{"input": "", "output": "7"}]}, "print(7.0000001)"),
    ({"tests": [{"input": "", "output": "1.0"}]}, "print('nan')"),
    ({"tests": [{"input": "", "output": "1 2"}]}, "print(1)\nprint(2)"),
    ({"tests": [{"input": "", "output": "1000000.5"}]}, "print(1000003.5)"),
    (SUM, "```python\nimport sys; sys.exit(1)\n```"),
    (TOTAL, "```python\n" + PROGRAM + "```\n```python\ndef total(xs):\n    return 1\n```"),
    ({"tests": {"fn_name": "total", "inputs": [[[4, 9]]], "outputs": [6]}}, PROGRAM),
    ({"tests": {"fn_name": "f", "inputs": [[1]], "outputs": ["1"]}}, "def f(x): return x"),
    (TOTAL, "```python\nexit()\n```"),
    (TOTAL, f"```python\n{PROGRAM}exit(1)\n```"),
    *[
        ({"tests": [{"input": "", "output": wanted}]}, f"print({got})")
        for got, wanted in (
            ("10**18", "1000000000000000001"),
            ("1e18", "1000000000000000001"),
            ("5.0", "1e400"),
            ("'v1.10'", "v1.1"),
            ("'1_0.0'", "10.0"),
        )
    ],
]

UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"tests": [{"in": "1", "out": "2"}]}, "a test of the column 'tests' must be {input, output}, [input"),
    ({"tests": "oops"}, "the column 'tests' is text that is neither JSON nor assert statements: Expecting value:"),
    ({"tests": {"inputs": ["1"], "outputs": []}}, "'inputs' and 'outputs' must be lists of one length, got 1 and 0"),
    ({"tests": []}, "the row's column tests is empty"),
    ({"tests": 5}, "the column 'tests' must be a list of tests, or {inputs, outp"),
    ({"answer": 1}, "code_tests needs a column test, test_list, test_cases, tests"),
    ({"test": "def check(c): pass"}, "the column 'test' needs a column 'entry_point' with the name"),
    (
        {
            "prompt": 'def total(xs):\n    """Sum of the integer square roots."""\n',
            "test": "def check(candidate) assert",
            "entry_point": "total",
        },
        "the tests cannot be run: SyntaxError: expected ':' (<unknown",
    ),
    ({"tests": [{"input": {"a": 1}, "output": "1"}]}, "the input of a test must be text, a number or a list of line"),
    ({"tests": [1, 2]}, "a test of the column 'tests' must be {input, output}, [input"),
    ({"test_list": None}, "code_tests needs a column test, test_list, test_cases, tests"),
    ({"tests": {"inputs": ["1"]}}, "the tests must have 'inputs' and 'outputs', got dict {'inputs': ['1']}"),
    (
        {"tests": {"fn_name": "a b", "inputs": [1], "outputs": [1]}},
        "'fn_name' of the column 'tests' must be the name of a function, got str 'a b'",
    ),
    ({"test_list": ["assert total([4, 9]) = 5"]}, "the tests cannot be run: SyntaxError: "),
]


@pytest.mark.parametrize(("row", "completion"), RIGHT)
def test_right_programs_pass(row: dict[str, Any], completion: str) -> None:
    result = GRADE(row.get("prompt", ""), completion, row)
    assert (result.value, result.status) == (1.0, "ok"), result.detail


@pytest.mark.parametrize(("row", "completion"), WRONG)
def test_wrong_programs_do_not(row: dict[str, Any], completion: str) -> None:
    result = GRADE(row.get("prompt", ""), completion, row)
    assert result.value == 0.0 and result.status in ("ok", "unparsed")


@pytest.mark.parametrize(("row", "reason"), UNUSABLE)
def test_rows_that_cannot_be_graded_are_rejected_with_the_reason(row: dict[str, Any], reason: str) -> None:
    result = GRADE("", PROGRAM, row)
    assert result.status == "rejected" and result.value != result.value and reason in result.detail


def test_the_tolerance_is_an_option() -> None:
    row = {"tests": [{"input": "", "output": "0.333"}]}
    assert GRADE("", "print(1 / 3)", row).value == 0.0
    assert load_grader({"name": "code_tests", "tolerance": 1e-3})("", "print(1 / 3)", row).value == 1.0


@pytest.mark.parametrize(
    "text", ["```\n", "```python\nx = 1\n", "```md\n", "def f(x) oops\n", "`", ">", PROGRAM, PROGRAM + "This is prose.\n"]
)
def test_long_completions_are_read_at_once(text: str) -> None:
    completion = (text * 20000)[:20000]
    start = time.process_time()
    for names in (["total"], []):
        find_program(TOTAL["prompt"], completion, names)
    assert time.process_time() - start < 5.0
