"""The Dockerfiles and .dockerignore, read: no engine builds them here (benchmarks/container.py builds the CPU one)."""

from __future__ import annotations

import os
import re
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from swinv2_scale.config.loader import load_config
from swinv2_scale.engine.doctor.compiled import operators_needed

REPOSITORY = Path(__file__).parents[2]
DOCKERFILES = sorted((REPOSITORY / "docker").glob("Dockerfile*"))
#: What a run reads, and so what every image needs.
RUNTIME = ("swinv2_scale", "configs", "launch")
#: registry/name:tag, the tag with a number in it, and a digest where one is known.
PINNED = re.compile(r"[a-z0-9.]+\.[a-z]+/[a-z0-9/._-]+:[a-z0-9._-]*\d[a-z0-9._-]*(@sha256:[0-9a-f]{64})?")

every_file = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, everything after it), comments left out and continued lines joined."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.lstrip().startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(words[0], " ".join(words[1:])) for words in map(str.split, lines) if words]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    start = max(number for number, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def defaults(path: Path) -> dict[str, str]:
    """The build arguments and what they are if nobody gives them."""
    pairs = [rest.partition("=") for name, rest in instructions(path) if name == "ARG"]
    return {name: value.strip('"') for name, _, value in pairs}


def is_in_context(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore lets a file into an image: the last pattern counts that matches it or a folder above it."""
    parts = path.split("/")
    whole = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    inside = True
    for pattern in patterns:
        body = pattern.removeprefix("!").strip("/")
        # `**/x` is x at any depth; a plain `*` does not go past a slash.
        names = parts if body.startswith("**/") else [w for w in whole if w.count("/") == body.count("/")]
        if any(fnmatchcase(name, body.removeprefix("**/")) for name in names):
            inside = pattern.startswith("!")
    return inside


def ignore_patterns() -> list[str]:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_there_are_two_images():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@every_file
def test_every_base_is_a_build_argument_with_a_pinned_default(path):
    stages: set[str] = set()
    for name, rest in instructions(path):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            if base not in stages:
                argument = re.fullmatch(r"\$\{(\w+)\}", base)
                assert argument, f"{base} can't be replaced by another base"
                assert PINNED.fullmatch(defaults(path)[argument[1]])
            stages.add(stage)
    assert "runtime" in stages


@every_file
def test_the_image_that_is_built_by_default_is_the_runtime(path):
    assert last_stage(path)[0][1].endswith(" AS runtime")


@every_file
def test_it_runs_as_nobody_in_particular(path):
    names = [name for name, _ in last_stage(path)]
    users = [rest for name, rest in last_stage(path) if name == "USER"]
    assert users == ["1000:1000"]  # a number: Kubernetes can't see that a name isn't root
    assert "RUN" not in names[names.index("USER") :]


@every_file
def test_it_says_how_it_is_and_passes_signals_on(path):
    stage = dict(last_stage(path))
    assert stage["HEALTHCHECK"].endswith('CMD ["swinv2-scale", "doctor"]')
    assert stage["ENTRYPOINT"] == '["python3", "/swinv2/docker/entrypoint.py"]'
    assert stage["CMD"].startswith("[")
    assert "org.opencontainers.image.title" in stage["LABEL"]


@every_file
def test_what_runs_has_no_compiler(path):
    text = " ".join(rest for _, rest in last_stage(path))
    assert re.findall(r"g\+\+|gcc|build-essential|-dev\b", text) == []


@every_file
def test_everything_that_is_copied_exists_and_is_in_the_context(path):
    patterns = ignore_patterns()
    sources = [rest.split()[:-1] for name, rest in instructions(path) if name == "COPY" and "--from=" not in rest]
    assert sources
    for source in (REPOSITORY / name for names in sources for name in names if name != "."):
        assert source.exists()
        a_file = next(p for p in source.rglob("*.*") if p.is_file()) if source.is_dir() else source
        assert is_in_context(a_file.relative_to(REPOSITORY).as_posix(), patterns)
    assert set(RUNTIME) <= {name for names in sources for name in names}


@every_file
def test_python_packages_are_pinned_and_indexes_stay_out_of_the_image(path):
    installs = [rest for name, rest in instructions(path) if name == "RUN" and "pip install" in rest]
    assert installs
    for command in installs:
        assert command.count("pip install") == command.count("--constraint constraints.txt")
        assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in command


def test_the_cuda_image_has_every_operator_that_a_run_can_ask_for():
    settings = ("zero_quantized_weights", "zero_quantized_gradients")
    overrides = [f"engine.deepspeed_overrides.zero_optimization.{key}=true" for key in settings]
    needed = operators_needed(load_config(REPOSITORY / "configs" / "quickstart" / "simmim.yaml", overrides).config)
    built = re.findall(r"DS_BUILD_(\w+)=1", (REPOSITORY / "docker" / "Dockerfile").read_text())
    assert built == [name.upper() for name in needed] == ["QUANTIZER"]


@every_file
def test_debian_packages_come_without_recommendations_and_leave_no_lists(path):
    for name, rest in instructions(path):
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest


@every_file
def test_no_secret_has_a_place(path):
    named = [rest for name, rest in instructions(path) if name in ("ARG", "ENV")]
    assert re.findall(r"(?i)\w*(?:passw|token|secret|credential|_key\b)\w*", " ".join(named)) == []


@pytest.mark.parametrize(
    "path",
    [
        *("runs/quickstart/checkpoints/x.pt", "shards/mine/train-000000.tar", ".venv/bin/python", ".git/config"),
        *("wheelhouse/x.whl", "notes.txt", ".env", "configs/.env", "swinv2_scale/__pycache__/x.cpython-311.pyc"),
        *(".ci/run", "swinv2_scale.egg-info/PKG-INFO", "configs/id.pem", "tests/.hypothesis/x"),
    ],
)
def test_what_is_not_the_repositorys_stays_out(path):
    assert not is_in_context(path, ignore_patterns())


def test_an_image_gets_what_git_has_and_nothing_that_git_ignores():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout: these are the files of an image")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = set(
        subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    )
    patterns = ignore_patterns()
    inside = set()
    for folder, folders, files in os.walk(REPOSITORY):
        here = Path(folder).relative_to(REPOSITORY)
        inside |= {p for p in ((here / name).as_posix() for name in files) if is_in_context(p, patterns)}
        folders[:] = [f for f in folders if is_in_context((here / f / "x").as_posix(), patterns)]
    assert inside <= tracked
    needed = {path for path in tracked if path.split("/")[0] in (*RUNTIME, "tests")}
    assert needed <= inside | {path for path in tracked if not (REPOSITORY / path).exists()}
