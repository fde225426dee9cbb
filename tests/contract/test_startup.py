"""The commands that only look at a configuration answer without importing torch, and never with a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart/simmim.yaml"

#: Runs the console command and says what it ended with and whether torch came in.
CHILD = """
import sys
from swinv2_scale.cli.main import main
code = main(sys.argv[1:])
print("exit code", code, "torch" in sys.modules, "numpy" in sys.modules)
"""


def python(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,  # a hang fails here instead of stopping CI
        check=False,
    )


@pytest.mark.parametrize("command", [["config", "check"], ["config", "explain"]], ids=" ".join)
def test_a_valid_configuration_is_answered_without_torch(command):
    result = python(CHILD, *command, QUICKSTART)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "exit code 0 False False"
    assert result.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        ["status", "."],
        ["recipe", "status", "configs/recipes/quickstart.yaml"],
        ["submit", QUICKSTART, "--nodes", "1", "--gpus-per-node", "1", "--print"],
        ["recipe", "submit", "configs/recipes/quickstart.yaml", "--nodes", "1", "--gpus-per-node", "1", "--print"],
    ],
    ids=" ".join,
)
def test_what_a_login_node_is_asked_is_answered_without_torch(command):
    result = python(CHILD, *command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "exit code 0 False False"


@pytest.mark.parametrize("train", ["embedded:fashion-mnist/train", "shards/*.tar", "shards/{000..127}.tar"])
def test_a_plan_is_made_without_torch(train):
    result = python(CHILD, "plan", QUICKSTART, "--gpus", "2", f"data.train={train}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split()[:4] == ["exit", "code", "0", "False"]


def test_a_broken_configuration_ends_with_78_and_a_message_without_torch(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text((REPOSITORY / QUICKSTART).read_text().replace("total_steps", "totl_steps"))
    result = python(CHILD, "config", "check", str(broken))
    assert result.stdout.splitlines()[-1] == "exit code 78 False False"
    assert f"{broken}:" in result.stderr
    assert "optim.totl_steps: no such key (did you mean optim.total_steps?)" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


@pytest.mark.parametrize("text", ["[", "extends: 5\n", "seed: 2024-13-45\n", "seed: \x07\n", "- a\n"])
def test_the_command_itself_ends_with_78_whatever_the_file_holds(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "swinv2_scale", "config", "check", str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,  # a hang fails here instead of stopping CI
        check=False,
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == 78
    assert result.stderr.startswith("error: ")


def test_a_usage_error_ends_with_78():
    result = python(CHILD, "config", "chek", QUICKSTART)
    assert result.returncode == 78
    assert "Traceback" not in result.stderr


def test_importing_the_package_imports_neither_torch_nor_numpy():
    result = python("import sys, swinv2_scale; print(swinv2_scale.__version__, 'torch' in sys.modules)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[1] == "False"


def test_configuration_classes_can_be_used_without_torch():
    source = (
        "import sys\n"
        "import swinv2_scale.config.loader, swinv2_scale.geometry, swinv2_scale.errors\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules, 'deepspeed' in sys.modules)\n"
    )
    assert python(source).stdout.split() == ["False", "False", "False"]
