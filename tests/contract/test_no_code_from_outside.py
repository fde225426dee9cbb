"""Files and words from outside are data: nothing in the package can turn them into code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import swinv2_scale

ROOT = Path(swinv2_scale.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "launch").rglob("*.py")])

#: Never called nor named, whatever the arguments.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads", "_pickle.Unpickler"),
    *("cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "pandas.read_pickle"),
    *("marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"),
    *("yaml.CLoader", "yaml.CFullLoader", "yaml.CUnsafeLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
}


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """What each imported name of a module really is: ``import numpy as np`` gives np -> numpy."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def real_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = real_name(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def argument(call: ast.Call, name: str) -> object:
    """The value of a keyword argument that is written as a constant; None where there is none."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else "not a constant"
        if keyword.arg is None:
            return "hidden in **"
    return None


def dangers(source: str) -> Iterator[str]:
    """``line: what`` for everything in a source that could run what it reads."""
    tree = ast.parse(source)
    names = names_of_imports(tree)
    for node in ast.walk(tree):
        is_read = isinstance(node, ast.Name | ast.Attribute) and isinstance(
            node.ctx, ast.Load
        )  # a field may be named so
        if is_read and real_name(node, names) in FORBIDDEN:
            yield f"{node.lineno}: {real_name(node, names)}"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in FORBIDDEN:
                    yield f"{node.lineno}: {node.module}.{alias.name}"
        if not isinstance(node, ast.Call):
            continue
        called = real_name(node.func, names)
        if called in ("torch.load", "torch.serialization.load") and argument(node, "weights_only") is not True:
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called == "numpy.load" and argument(node, "allow_pickle") not in (None, False):
            yield f"{node.lineno}: numpy.load with allow_pickle"
        explicit = any(keyword.arg == "shell" for keyword in node.keywords)
        if (explicit or called.startswith("subprocess.")) and argument(node, "shell") not in (None, False):
            yield f"{node.lineno}: {called} with shell"


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "[f for f in (eval,)]",
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as read\nread(b)",
        "def f():\n    import pickle\n    return pickle.Unpickler(x)",
        "import yaml\nyaml.load(t, yaml.SafeLoader)",
        "import yaml\nyaml.load(t, Loader=yaml.UnsafeLoader)",
        "import yaml\nclass L(yaml.FullLoader): pass",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=safe)",
        "import torch\ntorch.load(p, **options)",
        "from torch import load\nload(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import os\nos.system('ls')",
        "import os\nos.popen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.Popen('ls', shell=flag)",
        "from subprocess import run\nrun('ls', **options)",
        "start('ls', shell=True)",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(t)\nclass L(yaml.SafeLoader): pass",
        "import torch\ntorch.load(p, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(p)\nnp.load(p, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import re\nre.compile('x')",
        "class Model:\n    compile: bool = False",
        "f(**options)\nsubprocess.run(['ls'], check=True)",
        "engine.eval()\nmodel.load(p)\nimport json\njson.load(f)",
    ],
)
def test_the_check_lets_harmless_code_pass(source):
    assert list(dangers(source)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_a_module_runs_nothing_that_it_reads(path):
    assert list(dangers(path.read_text(encoding="utf-8"))) == []
