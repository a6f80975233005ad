"""Checks of text: strings, regular expressions, JSON Schema."""

from __future__ import annotations

import json
import math
import time

import pytest

from rewards import load_grader


def graded(reward, completion, row=None, **options):
    result = load_grader({"name": reward, **options})("", completion, row or {})
    return result.value, result.status


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("a b c", {"texts": ["a", "c"]}, (1.0, "ok")),
        ("a b", {"texts": ["a", "c"]}, (0.0, "ok")),
        ("a b", {"texts": ["a", "c"], "partial": True}, (0.5, "ok")),
        ("A b", {"texts": ["a"]}, (0.0, "ok")),
        ("A b", {"texts": ["a"], "ignore_case": True}, (1.0, "ok")),
        ("a b", {"texts": ["a"], "forbidden": ["b"]}, (0.0, "ok")),
        ("a", {"forbidden": ["b"]}, (1.0, "ok")),
        (" ", {"forbidden": ["b"]}, (0.0, "unparsed")),
    ],
)
def test_contains(completion, options, expected):
    assert graded("contains", completion, **options) == expected


def test_contains_takes_the_strings_of_a_row():
    assert graded("contains", "a b", {"answer": "b"}) == (1.0, "ok")
    assert graded("contains", "a b", {"answer": ["b", "c"]}, partial=True) == (0.5, "ok")


@pytest.mark.parametrize(("row", "options"), [({}, {}), ({"answer": ""}, {}), ({"answer": []}, {}), ({}, {"texts": [""]})])
def test_contains_without_a_string_raises(row, options):
    with pytest.raises(ValueError):
        graded("contains", "a", row, **options)


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("x = 12", {"pattern": r"\d+"}, (1.0, "ok")),
        ("x", {"pattern": r"\d+"}, (0.0, "ok")),
        ("x = 12", {"pattern": r"\d+", "whole": True}, (0.0, "ok")),
        (" 12\n", {"pattern": r"\d+", "whole": True}, (1.0, "ok")),
        ("a\nb", {"pattern": "A.B", "ignore_case": True}, (1.0, "ok")),
        ("", {"pattern": r"\d+"}, (0.0, "unparsed")),
        ("", {"pattern": ".*"}, (1.0, "ok")),
    ],
)
def test_regex(completion, options, expected):
    assert graded("regex", completion, **options) == expected
    row = {"pattern": options["pattern"]}
    assert graded("regex", completion, row, **{key: value for key, value in options.items() if key != "pattern"}) == expected


def test_a_match_that_takes_too_long_is_a_timeout_and_not_a_zero():
    start = time.monotonic()
    value, status = graded("regex", "a" * 60 + "!", pattern="(a|a)+b\\1?$|(a|aa)+$", seconds=0.2)
    assert status == "timeout" and math.isnan(value) and time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("row", "options"), [({}, {}), ({}, {"pattern": "("}), ({"pattern": "("}, {}), ({}, {"pattern": "a", "seconds": 0})]
)
def test_bad_patterns_raise(row, options):
    with pytest.raises(ValueError):
        graded("regex", "a", row, **options)


SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "a", "age": 3}', (1.0, "ok")),
        ('  {"name": "a"}\n', (1.0, "ok")),
        ('Here:\n```json\n{"name": "a"}\n```', (1.0, "ok")),
        ('{"name": 3}', (0.0, "ok")),
        ('{"age": 3}', (0.0, "ok")),
        ('{"name": "a", "age": -1}', (0.0, "ok")),
        ("[]", (0.0, "ok")),
        ("", (0.0, "unparsed")),
        ("{name: a}", (0.0, "unparsed")),
        ('{"name": "a", "age": NaN}', (0.0, "unparsed")),
        ("[" * 100_000, (0.0, "unparsed")),
        ("9" * 2_000_000, (0.0, "unparsed")),
        ('{"name": ' + "9" * 10_000 + "}", (0.0, "unparsed")),
    ],
)
def test_json_schema(completion, expected, tmp_path):
    assert graded("json_schema", completion, schema=json.dumps(SCHEMA)) == expected
    assert graded("json_schema", completion, {"schema": SCHEMA}) == expected
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert graded("json_schema", completion, schema=str(file)) == expected


def test_json_schema_in_tags():
    options = {"schema": json.dumps(SCHEMA), "answer": "tags"}
    assert graded("json_schema", 'so <answer>{"name": "a"}</answer>', **options) == (1.0, "ok")
    assert graded("json_schema", '{"name": "a"}', **options) == (0.0, "unparsed")


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}'])
def test_bad_schemas_raise(schema):
    with pytest.raises(ValueError, match="not a JSON schema"):
        graded("json_schema", "{}", schema=schema)
