r"""The mathematics verifier: labelled pairs, the GSM8K files, hostile input, threads.

`RIGHT` and `WRONG` hold (gold, completion), `math_pairs.jsonl` labelled rows of the kinds that graders get wrong (emphasis, boxes in boxes,
"the answer is correct", large powers, other forms of an equation, upright letters, variables under roots, letters in prose, qualifiers,
intervals in words, Chinese, decimals beside exact values); the verdicts follow from the mathematics and are written by hand.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from data_files import DATA, needs_data

from rewards import load_grader
from rewards.answers.symbolic import refusal

LARGEST_DISAGREEMENT = 0.01

GRADE = load_grader({"name": "math_answer"})
KINDS = [json.loads(line) for line in Path(__file__).with_name("math_pairs.jsonl").read_text(encoding="utf-8").split("\n") if line]


def graded(completion, gold):
    return GRADE("", completion, {"answer": gold})


SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"

RIGHT = [
    # where the answer stands
    ("72", SOLUTION),
    (SOLUTION, "72"),
    (SOLUTION, "She sold 24 in May, 48 + 24 = 72 altogether."),
    ("18", "3 + 4 = 7\n16 - 7 = 9\n9 * 2 = $18\nA: 18"),
    ("18", "#### 18 dollars"),
    ("18", "She makes $18.\n####18"),
    ("18", "The answer is 18."),
    ("18", "The final answer is: $\\boxed{18}$. I hope it is correct."),
    ("18", "So the answer is **18**."),
    ("18", "**Answer:** 18"),
    ("18", "**Final Answer**: $18$"),
    ("18", "Answer:\n\n18"),
    ("18", "ANSWER: 18 dollars per day"),
    ("18", "Therefore, the answer is that she makes 18 dollars every day."),
    ("18", "The answer is 18, because 16 - 3 - 4 = 9 and 9 * 2 = 18."),
    ("18", "The answer is 9 * 2 = 18."),
    ("18", "The answer to the problem is 18"),
    ("18", "<reasoning>9 * 2</reasoning><answer>18</answer>"),
    ("18", "<reasoning>\\boxed{7}</reasoning>\n<answer>\n\\boxed{18}\n</answer>"),
    ("18", "<think>maybe 20? the answer is 20</think>The answer is 18"),
    ("18", "<answer>The answer is 18.</answer>"),
    ("18", "I use the <answer> tag.\n<answer>18</answer>"),
    ("18", "<answer>$18</answer> and nothing else, of 3 kinds"),
    ("18", "It is \\boxed{17}. No, wait: \\boxed{18}."),
    ("18", "#### 17\nWait, that is wrong.\n#### 18"),
    ("18", "The answer is 17. Let me check. The answer is 18."),
    ("18", "\\boxed 18"),
    ("18", "\\fbox{18}"),
    ("18", "#### 18\n\nThe file has 3 more lines."),
    ("18", "Every day she has 9 eggs and makes $18 from them."),
    ("18", "He has 18."),
    ("18", "#### \\boxed{18}"),
    ("18", "A: $18.00"),
    # numbers
    ("1234", "#### 1,234"),
    ("1,234", "#### 1234"),
    ("1234", "\\boxed{1{,}234}"),
    ("1234", "\\boxed{1\\,234}"),
    ("1234567", "\\boxed{1,\\!234,\\!567}"),
    ("32348", "\\boxed{\\$32,\\!348}"),
    ("1234567", "1 234 567"),
    ("1,450,000", "A: $1,450,000.00"),
    ("12", "12.0"),
    ("12.0", "12"),
    ("12", "+12"),
    ("12", "012"),
    ("0.5", ".5"),
    ("-3", "\\boxed{-3}"),
    ("-3", "The answer is \u22123."),
    ("-3", "The answer is negative 3."),
    ("-3", "The answer is negative three."),
    ("-3", "The answer is minus 3 degrees."),
    ("-5", "-$5"),
    ("-5", "$-5$"),
    ("7", "The answer is seven."),
    ("21", "The answer is twenty-one apples."),
    ("1/3", "0.333333"),
    ("1/3", "0.\\overline{3}"),
    ("0.75", "\\boxed{\\frac{3}{4}}"),
    ("\\frac{3}{4}", "0.75"),
    ("\\frac{3}{4}", "\\boxed{\\dfrac{3}{4}}"),
    ("\\frac34", "3/4"),
    ("\\frac{3}{4}", "\\tfrac 3 4"),
    ("\\frac{3}{4}", "\\frac{6}{8}"),
    ("-\\frac{3}{4}", "\\frac{-3}{4}"),
    ("-\\frac{3}{4}", "\\boxed{-\\dfrac{3}{4}}"),
    ("1\\frac{1}{2}", "1.5"),
    ("1.5", "1 1/2"),
    ("2.5", "2\u00bd"),
    ("3000", "3 \\times 10^3"),
    ("0.00025", "2.5e-4"),
    ("5000000", "5 million"),
    ("100000", "\\boxed{10^5}"),
    ("2^{10}", "1024"),
    # percent
    ("50", "50%"),
    ("50%", "50"),
    ("50\\%", "\\boxed{50\\%}"),
    ("0.5", "50%"),
    ("50%", "0.5"),
    ("25", "The answer is 25 percent."),
    # units and currency
    ("3", "3 apples"),
    ("18", "$18.00"),
    ("18", "\\boxed{\\$18}"),
    ("\\$18.90", "18.90"),
    ("20", "\u20ac20"),
    ("25", "25 cm^2"),
    ("25", "\\boxed{25\\text{ cm}^2}"),
    ("25\\text{ cm}^2", "\\boxed{25}"),
    ("25\\text{ cm}", "25 centimeters"),
    ("90", "\\boxed{90^\\circ}"),
    ("90^\\circ", "90 degrees"),
    ("90^{\\circ}", "\\boxed{90}"),
    ("12", "\\boxed{12\\text{ square units}}"),
    ("5\\sqrt{2}", "\\boxed{5\\sqrt{2}\\text{ cm}}"),
    ("10", "10 km/h"),
    # LaTeX and algebra
    ("5", "x=5"),
    ("x=5", "5"),
    ("x = 5", "\\boxed{x=5}"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("\\frac{\\sqrt{3}}{3}", "\\boxed{\\frac{1}{\\sqrt{3}}}"),
    ("\\sqrt2", "sqrt(2)"),
    ("2\\pi", "$2\\pi$"),
    ("2\\pi", "2 \u03c0"),
    ("2\\pi", "2*pi"),
    ("\\frac{\\pi}{2}", "\\boxed{\\pi/2}"),
    ("(x+1)^2", "\\boxed{x^2+2x+1}"),
    ("x^2 + 2x + 1", "The answer is $(1+x)^2$."),
    ("y = 2x + 3", "\\boxed{2x+3}"),
    ("f(x) = 2x", "\\boxed{2x}"),
    ("x^2+y^2=1", "\\boxed{y^2 + x^2 = 1}"),
    ("\\log_2 3", "\\frac{\\ln 3}{\\ln 2}"),
    ("1+2i", "\\boxed{2i+1}"),
    ("2^{1000}", "4^{500}"),
    ("1,000\\pi", "1000\\pi"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\boxed{\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}}"),
    ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} -\\frac{1}{3} \\\\ 2 \\end{pmatrix}}"),
    ("2516_8", "\\boxed{2516_{8}}"),
    # several answers
    ("(2, 3)", "\\boxed{\\left(2,3\\right)}"),
    ("(2,3)", "\\boxed{(2.0, \\frac{6}{2})}"),
    ("\\left(3, \\frac{\\pi}{2}\\right)", "\\boxed{(3, \\pi/2)}"),
    ("2, 3", "x = 3 or x = 2"),
    ("2, 3", "The solutions are $x = 2$ and $x = 3$."),
    ("2,3", "\\boxed{2} and \\boxed{3}"),
    ("\\{1,2,3\\}", "\\boxed{\\{3, 1, 2\\}}"),
    ("1,-2", "\\boxed{-2,1}"),
    ("\\pm 3", "\\boxed{3, -3}"),
    ("3, -3", "\\boxed{\\pm 3}"),
    ("1 \\pm \\sqrt{2}", "\\boxed{1-\\sqrt{2}, 1+\\sqrt{2}}"),
    ("[2, 3)", "\\boxed{[2,3)}"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "\\boxed{(-\\infty,2)\\cup(3,\\infty)}"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "\\boxed{(3,\\infty)\\cup(-\\infty,2)}"),
    ("(2,3)", "\\boxed{2 < x < 3}"),
    ("[2,\\infty)", "\\boxed{x \\ge 2}"),
    ("(2,3)", "\\boxed{x \\in (2,3)}"),
    ("x = 1, y = 2", "\\boxed{x=1, y=2}"),
    # words, times, dates
    ("\\text{Evelyn}", "\\boxed{Evelyn}"),
    ("Evelyn", "The answer is \\boxed{\\text{evelyn}}."),
    ("\\text{(B)}", "The answer is (B)."),
    ("B", "\\boxed{\\text{(B)}}"),
    ("B", "The answer is (B) 12."),
    ("even", "\\boxed{\\text{even}}"),
    ("7:30", "The train comes at 7:30."),
    ("3:4", "The answer is 3:4."),
    ("3:4", "\\boxed{3 : 4}"),
    ("7:00 PM", "The answer is 7 pm."),
    ("5/12/2020", "The answer is 5/12/2020."),
    ("May 5", "\\boxed{\\text{May 5}}"),
    ("120", "\\boxed{5!}"),
    ("7:30 PM", "The train comes at 7:30 p.m."),
    ("7:30", "7:30 am"),
    ("18", "#### 18!"),
    (18, "18"),
    (0.5, "\\boxed{\\frac12}"),
]

WRONG = [
    ("3", "-3"),
    ("-3", "3"),
    ("1234", "1,235"),
    ("1234", "1.234"),
    ("12", "12.5"),
    ("12", "120"),
    ("1000000", "1000001"),
    ("0.5", "50"),
    ("50", "0.5"),
    ("50%", "0.5%"),
    ("5", "5x"),
    ("5", "\\boxed{5\\sqrt{2}}"),
    ("5", "\\boxed{5\\pi}"),
    ("5", "\\boxed{5 \\text{ or } 6}"),
    ("5", "\\boxed{(5, 6)}"),
    ("5\\text{ m}", "5 cm"),
    ("$18", "18 cents"),
    ("18", "The answer is 18. Let me check. The answer is 17."),
    ("18", "\\boxed{18} is too much, so \\boxed{17}"),
    ("18", "#### 18\nNo.\n#### 17"),
    ("18", "The answer is 180."),
    ("18", "18 is too much. A: 17"),
    ("18", "The answer is 1.8e3"),
    ("18", "5 - 3 = 2"),
    ("-3", "Take 5-3"),
    ("100", "The answer is one hundred twenty."),
    ("\\frac{3}{4}", "\\frac{4}{3}"),
    ("\\frac{3}{4}", "0.74"),
    ("1/3", "0.33"),
    ("1\\frac{1}{2}", "\\frac{11}{2}"),
    ("(2, 3)", "(3, 2)"),
    ("(2, 3)", "[2, 3]"),
    ("[2, 3)", "(2, 3]"),
    ("(2, 3)", "(2, 3, 4)"),
    ("(2, 3)", "\\boxed{2}"),
    ("2, 3", "2"),
    ("2, 3", "2, 3, 4"),
    ("\\{1,2\\}", "\\{1,3\\}"),
    ("\\pm 3", "3"),
    ("x = 5", "y = 5"),
    ("x=1, y=2", "x=2, y=1"),
    ("2\\sqrt{2}", "\\sqrt{2}"),
    ("2\\pi", "2"),
    ("x^2+1", "\\boxed{x^2-1}"),
    ("a+b", "\\boxed{a-b}"),
    ("(2,3)", "\\boxed{2 \\le x < 3}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}}"),
    ("2516_8", "\\boxed{2517_8}"),
    ("Evelyn", "\\boxed{\\text{Carla}}"),
    ("B", "The answer is (C)."),
    ("7:30", "7:35"),
    ("7:30", "730"),
    ("3:4", "4:3"),
    ("7 pm", "7 am"),
    ("5/12/2020", "12/5/2020"),
    ("5", "5/12/2020"),
    ("even", "\\boxed{\\text{odd}}"),
    ("18", "\\boxed{1/0}"),
    ("5", "\\boxed{5!}"),
    ("7:30 am", "7:30 pm"),
    ("18", "\\boxed{banana}"),
    ("18", "\\boxed{x}"),
    ("10", "\\boxed{2^{10}}"),
    ("\\infty", "\\boxed{-\\infty}"),
]

UNPARSED = [
    ("18", ""),
    ("18", "   \n "),
    ("18", "<think>9 * 2 = 18, so the answer is 18"),
    ("18", "<think>the answer is 18</think>"),
    ("18", "<reasoning>9 * 2 = 18</reasoning>"),
    ("18", "She makes \\boxed{18"),
    ("18", "She makes \\boxed{}"),
    ("18", "She makes 18 dollars.\n#### "),
    ("18", "9 * 2 = 18.\nThe answer is"),
    ("18", "<answer>18"),
    ("18", "<answer></answer>"),
    ("18", "I do not know."),
    ("18", "\\boxed{" + "\\sqrt{" * 50 + "18" + "}" * 50 + "}"),
    ("18", "\\boxed{" + "1" * 5000 + "}"),
    ("18", "\\boxed{10^{10^{10}}}"),
    ("18", "\\boxed{10**10**10}"),
    ("18", "\\boxed{((99^{99})^{99})^{99}}"),
    ("18", "\\boxed{99999!}"),
    ("18", "\\boxed{((9!)!)!}"),
    ("18", "\\boxed{(x+y)^{9999}}"),
    ("18", "\\boxed{\\binom{99999}{50000}}"),
    ("18", "\\boxed{\\sum_{k=1}^{10^9} k}"),
    ("18", "\\boxed{\\frac{}{}}"),
    ("18", "one hundred and eighteen"),
]


@pytest.mark.parametrize("row", KINDS, ids=lambda row: f"{row['answer']}-{row['completion']}")
def test_kinds_that_graders_get_wrong(row):
    result = graded(row["completion"], row["answer"])
    assert (result.value == 1.0) == row["label"], result.detail


@needs_data("../cases")
def test_every_labelled_case():
    rows = [
        (path.name, json.loads(line))
        for path in sorted((DATA.parent / "cases").glob("math_*.jsonl"))
        for line in path.open(encoding="utf-8")
    ]
    wrong = [(name, row) for name, row in rows if (graded(row["completion"], row["answer"]).value == 1.0) != row["label"]]
    assert rows and not wrong


def test_there_are_enough_pairs_and_none_twice():
    assert len(set(RIGHT + WRONG + UNPARSED)) == len(RIGHT) + len(WRONG) + len(UNPARSED) >= 120


@pytest.mark.parametrize(("gold", "completion"), RIGHT)
def test_right(gold, completion):
    result = graded(completion, gold)
    assert (result.value, result.status) == (1.0, "ok"), result.detail


@pytest.mark.parametrize(("gold", "completion"), WRONG)
def test_wrong(gold, completion):
    result = graded(completion, gold)
    assert (result.value, result.status) == (0.0, "ok"), result.detail


@pytest.mark.parametrize(("gold", "completion"), UNPARSED)
def test_unparsed_says_why(gold, completion):
    result = graded(completion, gold)
    assert (result.value, result.status) == (0.0, "unparsed") and result.detail


def test_all_unparsed_and_wrong_are_counted():
    statuses = Counter(graded(completion, gold).status for gold, completion in RIGHT + WRONG + UNPARSED)
    assert statuses == {"ok": len(RIGHT) + len(WRONG), "unparsed": len(UNPARSED)}


@pytest.mark.parametrize(
    "gold", ["", "  ", "...", "She sold 72.\n#### ", "\\boxed{72", "\\frac{1}{2", "1" * 5000, "\\sqrt{" * 40 + "}" * 40, None, ["72"], True]
)
def test_a_gold_answer_that_cannot_be_read_is_the_datas_fault(gold):
    with pytest.raises(ValueError, match="answer") as caught:
        graded("72", gold)
    assert "\n" not in str(caught.value)


def test_a_missing_gold_column_is_named():
    with pytest.raises(ValueError, match="column 'answer', the task's rows have: gold"):
        GRADE("", "72", {"gold": "72"})


HOSTILE = [
    "9" * 2_000_000,
    "1/" * 500_000,
    "1,234" * 300_000,
    "1 2/" * 400_000,
    "$" * 1_000_000,
    "\\boxed{" * 200_000,
    "\\boxed{1}" * 200_000,
    "#" * 1_000_000,
    "#### " * 200_000,
    "<answer>" * 200_000,
    "<think>" * 200_000,
    "<think></think>" * 100_000,
    "the answer is " * 100_000,
    "answer to " * 100_000,
    "A:\n" * 300_000,
    "- " * 500_000,
    "\\text{" * 200_000,
    "\\frac" * 200_000,
    "one " * 300_000,
    "\\boxed{" + "(" * 900 + "}",
    "\\boxed{" + "-" * 900 + "1}",
    "\\boxed{" + "1," * 450 + "1}",
    "\\boxed{" + "\\pm " * 200 + "1}",
    "\\boxed{" + "x^" * 60 + "x}",
    "\\boxed{" + "\\frac{1}{1+" * 6 + "x" + "}" * 6 + "}",
    "\\boxed{" + "(x+1)" * 30 + "}",
    "\\boxed{\\sin(\\cos(\\sin(\\cos(\\sin(x)))))}",
    "\\boxed{(a+b+c+d+e+f)^{12}}",
    "\\boxed{\\sqrt{" + "\\sqrt{2+" * 6 + "x" + "}" * 7 + "}",
    "\\boxed{x^{50} - 3x^{17} + 1 > 0}",
    "\\boxed{18 + (a+b+c+d+e+f)^{12} - (a+b+c+d+e)^{12}}",
    "\\boxed{\\begin{pmatrix} (a+b+c+d+e+f)^{12} \\\\ 1 \\end{pmatrix}}",
    "\\boxed{n(a+b+c+d+e+f)^{12}}",
    "\\boxed{\\frac{(a+b+c+d+e+f)^{12}}{(a-b-c-d-e-f)^{11}}}",
    "\\boxed{(a+b+c+d+e+f)^{12} > 2}",
    "\\boxed{\\sin(x) + \\cos(3x) > \\frac{1}{2}}",
    "\\boxed{x^5 - 3x^3 + x < 7}",
    "\\boxed{\\sqrt{x+1} + \\sqrt{x+2} + \\sqrt{x+3} = 18}",
    "\\boxed{x^y + y^z + z^x = 18}",
    "\\boxed{|x-1| + |x-2| + |x^2-3| < 4}",
    "\\boxed{e^{e^{e^{10}}}}",
    "\\boxed{10^{9999} + 10^{-9999}}",
    "\\boxed{2^{3^{4^{5}}}}",
    "\\boxed{10^10^10}",
    "\\boxed{\\sqrt[9999]{123456789012345}}",
    "\\boxed{1e999999999}",
    "\\boxed{0.\\overline{" + "3" * 900 + "}}",
    "\x00\ud800\uffff",
]


@pytest.mark.parametrize("gold", ["18", "x^2+1", "(2, 3)", "x > 2", "x^2+y^2=1"])
def test_hostile_completions_end_soon_and_are_not_right(gold):
    for completion in HOSTILE:
        start = time.process_time()
        result = graded(completion, gold)
        assert result.value == 0.0 and result.status in ("ok", "unparsed"), completion[:60]
        assert time.process_time() - start < 8, f"{completion[:60]} of {len(completion)} characters against {gold}"


@pytest.mark.parametrize(
    "text",
    ["10^{10^{10}}", "10^10^10", "(x+y)^{99}", "((9^{99})^{99})^{99}", "9999!", "(9!)!", "2^{9!}", "\\int_0^1 x dx", "x+" * 150],
)
def test_refused_expressions(text):
    assert refusal(text)


@pytest.mark.parametrize("text", ["2^{1000}", "(x+y)^{5}", "e^{x^2}", "5!", "n!", "\\binom{10}{3}", "\\sqrt{2}", "x^2+2x+1"])
def test_ordinary_expressions_are_evaluated(text):
    assert refusal(text) is None


def test_symbolic_comparison_works_off_the_main_thread():
    results = {}
    pairs = [("\\sqrt{12}", "\\boxed{2\\sqrt{3}}"), ("(x+2)^2", "\\boxed{x^2+4x+4}"), ("\\sqrt{12}", "\\boxed{3\\sqrt{2}}")]
    thread = threading.Thread(target=lambda: results.update({pair: graded(pair[1], pair[0]) for pair in pairs}))
    thread.start()
    thread.join()
    assert [(results[pair].value, results[pair].status) for pair in pairs] == [(1.0, "ok"), (1.0, "ok"), (0.0, "ok")]


def read_rows(name):
    return [json.loads(line) for line in (DATA / "gsm8k" / name).read_text(encoding="utf-8").splitlines()]


@needs_data("gsm8k")
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_every_gsm8k_gold_answer_verifies(name):
    rows = read_rows(name)
    statuses = Counter((result.value, result.status) for result in (graded(row["answer"], row["answer"]) for row in rows))
    assert statuses == {(1.0, "ok"): len(rows)}


@needs_data("gsm8k")
def test_agreement_with_the_official_labels():
    rows = read_rows("model_solutions_labelled.jsonl")
    results = [graded(row["completion"], row["answer"]) for row in rows]
    assert sum(Counter(result.status for result in results).values()) == len(rows) and all(result.valid for result in results)
    disagreements = [index for index, (row, result) in enumerate(zip(rows, results, strict=True), 1) if (result.value == 1) != row["label"]]
    assert len(disagreements) <= LARGEST_DISAGREEMENT * len(rows), disagreements
