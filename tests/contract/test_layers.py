"""The layers of docs/architecture.md: no import runs up, none runs in a circle, each library has one door."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import swinv2_scale

ROOT = Path(swinv2_scale.__file__).parent
PACKAGE = "swinv2_scale"

#: First name below the package -> layer. ``__main__`` stands above all: it starts the console command.
LAYERS = {
    "__main__": 6,
    "cli": 5,
    "engine": 4,
    "tasks": 3,
    "models": 2,
    "weights": 2,
    "data": 2,
    "plan": 1,
    "dist": 1,
    "draws": 1,
    "telemetry": 1,
    "config": 0,
    "geometry": 0,
    "errors": 0,
    "durable": 0,
    "launchers": 0,
}
BLIND_TO_EACH_OTHER = {"models", "weights", "data"}
NEVER_TORCH = {"config", "geometry", "errors", "durable", "launchers"}


@dataclass(frozen=True)
class Import:
    """One name that a module imports: a module, or something out of one."""

    module: str
    name: str
    line: int

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    def is_below(self, package: str) -> bool:
        return f"{self.dotted}.".startswith(f"{package}.")


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a source, wherever it stands: in functions, under ``if``, under TYPE_CHECKING, by import_module.

    An attribute like ``torch.distributed.barrier`` counts as an import of its module: torch loads it by itself.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from (Import(base, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            dotted = dotted_name(node)
            if dotted.startswith("torch."):
                yield Import(dotted, "", node.lineno)
        elif isinstance(node, ast.Call) and dotted_name(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, "", node.lineno)


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {
    module: tuple(imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))
    for module, path in FILES.items()
}


def ours(imported: Import) -> str | None:
    """The module of the package that an import loads, None for other packages."""
    if not imported.is_below(PACKAGE):
        return None
    return imported.dotted if imported.dotted in FILES else imported.module


def arrows() -> Iterator[tuple[str, str, int]]:
    for module, imports in IMPORTS.items():
        for imported in imports:
            target = ours(imported)
            if target is not None and target != module:
                yield module, target, imported.line


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def place(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(ROOT.parent)}:{line}"


def external(package: str) -> list[tuple[str, str]]:
    """(file, place) of every import of a package that isn't ours."""
    return [
        (FILES[module].relative_to(ROOT).as_posix(), place(module, imported.line))
        for module, imports in IMPORTS.items()
        for imported in imports
        if imported.is_below(package)
    ]


# The reader of imports itself


def test_imports_are_found_wherever_they_stand():
    source = """
import a.b as c
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from d import e
def f():
    from g.h import i
    class K:
        import l
        def m(self):
            try:
                import n
            except ImportError:
                import_module("o.p")
            return torch.distributed.barrier()
"""
    found = {imported.dotted for imported in imports_of(source, "swinv2_scale.x")}
    assert {"a.b", "d.e", "g.h.i", "l", "n", "o.p", "torch.distributed.barrier"} <= found


def test_relative_imports_are_found_by_their_whole_name():
    source = "from . import a\nfrom .b import c\nfrom ..d import e\n"
    found = [imported.dotted for imported in imports_of(source, "swinv2_scale.engine.job")]
    assert found == ["swinv2_scale.engine.a", "swinv2_scale.engine.b.c", "swinv2_scale.d.e"]
    in_package = [i.dotted for i in imports_of("from . import a\n", "swinv2_scale.engine", is_package=True)]
    assert in_package == ["swinv2_scale.engine.a"]


def test_the_package_was_read():
    assert {"swinv2_scale", "swinv2_scale.cli.main", "swinv2_scale.models.ops.attend"} <= set(FILES)
    assert ("swinv2_scale.cli.train", "swinv2_scale.engine.job") in {(a, b) for a, b, _ in arrows()}


# Layers


def test_every_room_has_a_layer():
    assert {room(module) for module in FILES} - {""} <= set(LAYERS)


def test_no_import_runs_up():
    up = [
        f"{place(module, line)}: {room(module)} imports {target}"
        for module, target, line in arrows()
        if room(module) and room(target) and LAYERS[room(target)] > LAYERS[room(module)]
    ]
    assert up == []


def test_models_weights_and_data_are_blind_to_each_other():
    seen = [
        f"{place(module, line)}: {room(module)} imports {target}"
        for module, target, line in arrows()
        if {room(module), room(target)} <= BLIND_TO_EACH_OTHER and room(module) != room(target)
    ]
    assert seen == []


def test_nothing_inside_imports_the_top_of_the_package():
    # It would close a circle: the top hands out what the rooms define.
    assert [place(module, line) for module, target, line in arrows() if target == PACKAGE] == []


def test_only_the_console_command_imports_the_cli():
    importers = {module for module, target, _ in arrows() if room(target) == "cli" and room(module) != "cli"}
    assert importers <= {"swinv2_scale.__main__"}


def test_no_import_runs_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, target, _ in arrows():
        graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


def test_no_room_imports_another_that_imports_it():
    graph: dict[str, set[str]] = {}
    for module, target, _ in arrows():
        if room(module) != room(target) and room(module):
            graph.setdefault(room(module), set()).add(room(target))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle: " + " <- ".join(error.args[1]))


# Libraries


@pytest.mark.parametrize("package", ["torch", "numpy", "deepspeed"])
def test_config_geometry_and_errors_stay_light(package):
    # plan has no torch either: it must answer on a login node in a second.
    rooms = NEVER_TORCH | {"plan"} if package != "numpy" else NEVER_TORCH
    assert [where for file, where in external(package) if file.split("/")[0].removesuffix(".py") in rooms] == []


@pytest.mark.parametrize(
    ("package", "door"),
    [
        ("deepspeed", "engine/"),
        ("fairscale", "engine/activation_checkpointing.py"),
        ("webdataset", "data/"),
        ("tensorboard", "telemetry/tensorboard.py"),
        ("tensorboardX", "telemetry/tensorboard.py"),
        ("torch.utils.tensorboard", "telemetry/tensorboard.py"),
        ("torch.distributed", "dist.py"),
        ("torch._C._distributed_c10d", "dist.py"),
    ],
)
def test_a_library_comes_in_through_one_door(package, door):
    assert [where for file, where in external(package) if not file.startswith(door)] == []


@pytest.mark.parametrize("package", ["deepspeed", "fairscale", "webdataset", "torch.utils.tensorboard"])
def test_the_doors_are_in_use(package):
    assert external(package)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_models_that_we_compare_with_are_never_imported(package):
    assert external(package) == []


# Names and initialisers


def test_no_module_is_called_after_nothing():
    names = {part for path in FILES.values() for part in path.relative_to(ROOT).with_suffix("").parts}
    assert names & {"utils", "util", "common", "helpers", "helper", "misc"} == set()


@pytest.mark.parametrize("path", [p for p in FILES.values() if p.name == "__init__.py" and p.parent != ROOT], ids=str)
def test_the_init_of_a_room_holds_a_docstring_and_nothing_else(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in FILES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_top_of_the_package_imports_none_of_its_rooms_at_once():
    assert [i.dotted for i in IMPORTS[PACKAGE] if i.is_below(PACKAGE) or i.is_below("torch")] == []


def test_the_top_of_the_package_hands_out_what_it_lists():
    for name in swinv2_scale.__all__:
        assert getattr(swinv2_scale, name) is not None
    assert {"create_model", "list_models"} <= set(swinv2_scale.__all__)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        _ = swinv2_scale.creat_model
