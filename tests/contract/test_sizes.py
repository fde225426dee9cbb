"""Rooms that stay liveable: no file, function or constructor grows past what can be read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import swinv2_scale

ROOT = Path(swinv2_scale.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_CONSTRUCTOR = 399, 80, 40


def functions(source: str) -> Iterator[tuple[str, int, bool]]:
    """(name and line, lines from the first decorator to the end, is a class's constructor) of every function."""

    def visit(node: ast.AST, inside_class: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                lines = (child.end_lineno or first) - first + 1
                yield f"{child.name}:{child.lineno}", lines, inside_class and child.name == "__init__"
            yield from visit(child, isinstance(child, ast.ClassDef))

    yield from visit(ast.parse(source), False)


def test_functions_are_measured_with_their_decorators_wherever_they_stand():
    source = """
class A:
    def __init__(self):
        def inner():
            pass
        inner()

@decorator
@another(
    1
)
async def f():
    pass

def __init__():
    pass
"""
    assert list(functions(source)) == [
        ("__init__:3", 4, True),
        ("inner:4", 2, False),
        ("f:12", 6, False),
        ("__init__:15", 2, False),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_stays_under_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


def test_no_function_is_longer_than_80_lines():
    long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in FILES
        for name, lines, _ in functions(path.read_text(encoding="utf-8"))
        if lines > MAX_FUNCTION
    ]
    assert long == []


def test_no_constructor_is_longer_than_40_lines():
    long = [
        f"{path.relative_to(ROOT)}: {name} has {lines} lines"
        for path in FILES
        for name, lines, is_constructor in functions(path.read_text(encoding="utf-8"))
        if is_constructor and lines > MAX_CONSTRUCTOR
    ]
    assert long == []
