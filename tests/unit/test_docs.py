"""The documentation names what is there: paths, modules, files, links and commands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from test_contributing import PARTS

import rlhub
from rlhub.commands.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
FOLDERS = "rlhub|workers|rewards|recipes|tests|benchmarks|docs|examples"
INVENTED = {file for file, _, _ in PARTS.values()}  # the new files of CONTRIBUTING.md's examples
# Files of a reader's.
YOURS = {"asymmetric.py", "datasets.py", "grader.py", "my_part.py", "my_views.py", "rewards.py", "rlhub.py", "workers.py"}


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_paths(page):
    found = re.findall(rf"(?<![\w/.*<>{{-])((?:{FOLDERS})/[\w./*-]*)", text(page))
    paths = {path.rstrip(".").removesuffix("-") for path in found} - INVENTED
    assert [path for path in sorted(paths) if not list(ROOT.glob(path.rstrip("/")))] == []


def test_modules(page):
    missing = []
    for name in set(re.findall(r"`((?:rlhub|workers|rewards)(?:\.\w+)+)", text(page))) - YOURS:
        head, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            holder = rlhub if head == "rlhub" else _imported(head)
            if not hasattr(holder, last):
                missing.append(name)
    assert missing == []


def _imported(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def test_files(page):
    known = {file.name for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*.*")}
    known |= {Path(file).name for file in INVENTED} | YOURS
    assert [name for name in set(re.findall(r"`(\w+\.py)`", text(page))) if name not in known] == []


def test_links(page):
    links = re.findall(r"\]\(([^)#\s]+\.(?:md|png|py|yaml|yml))(?:#[^)]*)?\)", text(page))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_commands(page):
    named = re.findall(r"(?:^ {4}|`)rlhub ([a-z]+)", text(page), re.M)
    assert [name for name in named if name not in main.commands] == []


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\(docs/([\w.]+\.md)\)", text(ROOT / "README.md")))
    assert {file.name for file in (ROOT / "docs").glob("*.md")} <= linked
