"""Wheels for a machine without a network that has Python 3.12, torch with CUDA, numpy and OpenCV: what a run needs
besides, 30 MiB.

    .venv/bin/python benchmarks/wheelhouse.py                       # into wheelhouse/, which git ignores
    .venv/bin/python benchmarks/wheelhouse.py --present torch       # 105 MiB: OpenCV's wheel alone has 58, numpy's 16

There, in a copy of the repository with wheelhouse/ (no pip download, no compiler, nothing installed for others):

    python3 -m pip install --no-index --no-deps --target /tmp/site wheelhouse/*.whl
    PYTHONPATH=/tmp/site:$PWD python3 benchmarks/gpu.py > gpu.md

Which packages: what pyproject.toml asks for and what that asks for, without what is --present and what only that
needs.
Which versions: those of constraints.txt. DeepSpeed and fairscale are published as source alone; their wheels are built
here, pure Python (no operator is compiled: a run asks for none). Everything else is the package index's wheel for that
Python on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
#: What the machine has, if nobody says otherwise.
PRESENT = ("torch", "numpy", "opencv-python-headless")
#: Published as source only; no wheel of them is bound to a Python or a machine unless operators are compiled.
SOURCE_ONLY = ("deepspeed", "fairscale")
#: Wheels of these kinds run on every x86-64 Linux with glibc 2.28 or newer.
PLATFORMS = tuple(
    f"{name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", metavar="3.N", help="of the machine that the wheels go to")
    parser.add_argument("--present", nargs="+", default=PRESENT, metavar="PACKAGE", help="what it has already")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "wheelhouse")
    parser.add_argument("--max-mib", type=float, default=64.0)
    arguments = parser.parse_args()
    if any(arguments.folder.glob("*.whl")):
        print(f"{arguments.folder} has wheels already: remove it first", file=sys.stderr)
        return 1
    names = needed(set(map(canonicalize_name, arguments.present)), arguments.python)
    fetch(names, arguments.python, arguments.folder)
    wheels = sorted(arguments.folder.glob("*.whl"), key=lambda path: -path.stat().st_size)
    mib = sum(path.stat().st_size for path in wheels) / 2**20
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{mib:7.2f} MiB  in {len(wheels)} wheels, at most {arguments.max_mib:g}")
    return int(mib > arguments.max_mib)


def needed(present: set[str], python: str) -> list[str]:
    """Names of all packages that this one needs, itself and those in ``present`` left out.

    Read from what is installed here, with the conditions of the other machine's Python.
    """
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = list(project["dependencies"])
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        is_for_it = requirement.marker is None or requirement.marker.evaluate(environment)
        if is_for_it and name not in found | present:
            found.add(name)
            waiting += distribution(name).requires or []
    return sorted(found)


def fetch(names: Iterable[str], python: str, folder: Path) -> None:
    """Download or build one wheel of each package into a folder.

    Raises:
        subprocess.CalledProcessError: pip found none; it has said why.
    """
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    pins = {canonicalize_name(name): f"{name}=={version}" for name, version in pins.items()}
    pip = [sys.executable, "-m", "pip"]
    to_folder = ["--quiet", "--no-deps", "--no-cache-dir"]
    built = [pins[name] for name in names if name in SOURCE_ONLY]
    ready = [pins.get(name, name) for name in names if name not in SOURCE_ONLY]
    # Like docker/Dockerfile.cpu: their build must neither compile operators nor look for a GPU.
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu", "BUILD_CUDA_EXTENSIONS": "0"}
    if built:
        subprocess.run([*pip, "wheel", *to_folder, "-w", str(folder), *built], check=True, env=environment)
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*pip, "download", *to_folder, *target, "-d", str(folder), *ready], check=True)


if __name__ == "__main__":
    sys.exit(main())
