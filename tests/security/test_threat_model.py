"""docs/threat-model.md promises nothing that no test shows, and names no test that is not there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "threat-model.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LIMIT = "**limit**"
LINES_MIN = 40


def rows() -> list[tuple[str, str, str]]:
    """The lines of the page's tables, their headings left out."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split(" |"))
        if not line.startswith("|") or set(line) <= set("|-"):
            continue
        assert len(cells) == 3, line
        if cells[2] != "shown by":
            found.append(cells)
    return found


@functools.cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_every_line_is_shown_by_a_test_or_is_named_as_a_limit() -> None:
    lines = rows()
    assert len(lines) >= LINES_MIN
    for what, happens, shown in lines:
        assert bool(NAMED.search(shown)) != happens.startswith(LIMIT), what


@pytest.mark.parametrize("named", sorted(set(NAMED.findall(PAGE.read_text()))), ids="::".join)
def test_every_test_that_is_named_is_there(named: tuple[str, str]) -> None:
    path, name = named
    assert name.startswith("test_")
    assert name in functions_of(path)


def test_what_looks_like_a_test_s_name_is_one() -> None:
    assert len(re.findall(r"tests/\w", PAGE.read_text())) == len(NAMED.findall(PAGE.read_text()))


def test_no_file_of_security_tests_is_left_out() -> None:
    named = {path for path, _name in NAMED.findall(PAGE.read_text())}
    files = {f"tests/security/{path.name}" for path in (ROOT / "tests" / "security").glob("test_*.py")}
    assert files - named == {"tests/security/test_threat_model.py"}
