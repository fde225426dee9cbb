"""docs/resume.md promises something for each fault of the catalogue, and names tests that exist."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "resume.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| F\d", line)
]


def test_each_of_the_28_faults_has_one_row_in_order():
    assert [row[0] for row in ROWS] == [f"F{number}" for number in range(1, 29)]
    assert all(len(row) == 5 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_of_a_row_exist_and_carry_its_number(row):
    tests = row[3]
    if tests.startswith("not tested: "):
        assert len(tests.split()) > 5, "say why"
        return
    named = re.findall(r"`([\w/.]+)::([\w*]+)`", tests)
    assert named, tests
    assert not re.sub(r"`[^`]*`|[, ]", "", tests), "nothing but names of tests"
    for file, pattern in named:
        path = TESTS / file
        functions = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if is_test(node)]
        assert f"f{int(row[0][1:]):02d}_" in pattern
        assert any(fnmatch(name, pattern) for name in functions), f"{path} has no {pattern}"


def is_test(node):
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
