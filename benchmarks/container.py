"""The CPU image (docker/Dockerfile.cpu) built and used without an engine: buildah, Debian's debootstrap, root.

    apt-get install --no-install-recommends buildah debootstrap
    .venv/bin/python benchmarks/container.py FOLDER build health quick-start stop tests \
        > benchmarks/results/container_HARDWARE_YYYYMM.md

Everything lies in FOLDER, about 10 GB of it (buildah's vfs store copies every layer whole); delete it afterwards. Parts
may be run one after another. No registry of images is asked: the base is a Debian made by debootstrap, which is what
BASE is an argument for. --pip-args, --pins, --pip-conf and --mount are handed on to the build (torch's index of CPU
wheels is the default there).

build:        base and runtime, with their times and sizes.
health:       the image's health check, as user 1000.
quick-start:  the quick start as user 1000 in the image's files (chroot; no network, process or user namespace).
stop:         a container by unshare, docker/entrypoint.py its process 1: `deepspeed` trains, process 1 gets SIGTERM as
              from `docker stop`; then the same command again.
tests:        the target `test`, built, and the contract and unit tests in it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil
from machine import describe_machine

REPOSITORY = Path(__file__).parents[1]
BASE = "localhost/debian-python:bookworm"
IMAGES = {"runtime": "localhost/swinv2-scale:cpu", "test": "localhost/swinv2-scale:cpu-test"}
QUICK_START = ["deepspeed", "-q", "--num_gpus", "2", "launch/pretrain.py", "--config", "configs/quickstart/simmim.yaml"]
TESTS = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract", "tests/unit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=("build", "health", "quick-start", "stop", "tests"))
    parser.add_argument("--pip-args", default="", help="build argument PIP_ARGS")
    parser.add_argument("--pins", default="", help="build argument PINS")
    parser.add_argument("--extras", default="dev", help="build argument EXTRAS of the target `test`")
    parser.add_argument("--test-packages", default="", help="installed for the tests, besides")
    parser.add_argument("--ignore", action="append", default=[], help="a file of tests to leave out")
    parser.add_argument("--pip-conf", type=Path, help="the build secret `pip`")
    parser.add_argument("--mount", action="append", default=[], metavar="HERE:THERE:ro", help="during the build only")
    arguments = parser.parse_args()
    store = Store(arguments.folder)
    parts = {
        "build": lambda: build(store, arguments),
        "health": lambda: health(store),
        "quick-start": lambda: quick_start(store),
        "stop": lambda: stop(store),
        "tests": lambda: tests(store, arguments),
    }
    for part in arguments.parts:
        parts[part]()


class Store:
    """buildah with all its files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.policy = self.folder / "policy.json"
        self.policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    @cached_property
    def command(self) -> list[str]:
        places = ["--root", str(self.folder / "root"), "--runroot", str(self.folder / "run")]
        return ["buildah", *places, "--storage-driver", "vfs"]

    def buildah(self, *arguments: str) -> str:
        """Standard output; the rest goes to standard error.

        Raises:
            subprocess.CalledProcessError: buildah has said why.
        """
        return subprocess.run([*self.command, *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()

    def build(self, context: Path, *arguments: str) -> None:
        common = ["bud", "--signature-policy", str(self.policy), "--isolation", "chroot", "--pull-never"]
        log = self.buildah(*common, "--format", "docker", *arguments, str(context))  # OCI's has no health check
        print(log, file=sys.stderr)

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """Its name."""
        name = self.buildah("from", "--pull-never", "--signature-policy", str(self.policy), image)
        try:
            yield name
        finally:
            self.buildah("rm", name)


def build(store: Store, arguments: argparse.Namespace) -> None:
    print("# The CPU image\n")
    print(f"- machine: {describe_machine()}")
    print(f"- {store.buildah('--version')}; storage vfs, isolation chroot, no engine, no registry of images")
    print(f"- command: `.venv/bin/python benchmarks/container.py {' '.join(sys.argv[1:])}`\n")
    print("| | s | size |\n|---|---|---|")
    base_s = timed(lambda: build_base(store))
    print(f"| base: Debian 12 minimal with python3, by debootstrap | {base_s:.0f} | {size(store, BASE)} |")
    build_target(store, arguments, "runtime")
    settings = json.loads(store.buildah("inspect", "--type", "image", IMAGES["runtime"]))["Docker"]["config"]
    print(f"\nUser {settings['User']}, entry point `{' '.join(settings['Entrypoint'])}`, ", end="")
    print(f"health check `{' '.join(settings['Healthcheck']['Test'])}`.\n")


def build_base(store: Store) -> None:
    with tempfile.TemporaryDirectory(dir=store.folder) as name:
        root = Path(name) / "root"
        packages = "--include=ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
        subprocess.run([*command, "http://deb.debian.org/debian"], check=True, stdout=sys.stderr)
        subprocess.run(["chroot", str(root), "apt-get", "clean"], check=True)
        with tarfile.open(Path(name) / "base.tar", "w") as tar:
            for entry in root.iterdir():
                if entry.name not in ("dev", "proc", "sys"):
                    tar.add(entry, entry.name)
        (Path(name) / "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["/bin/bash"]\n')
        (Path(name) / ".dockerignore").write_text("root\n")
        store.build(Path(name), "--tag", BASE)


def health(store: Store) -> None:
    print("## The health check\n")
    settings = json.loads(store.buildah("inspect", "--type", "image", IMAGES["runtime"]))["Docker"]["config"]
    command = settings["Healthcheck"]["Test"][1:]
    with store.container(IMAGES["runtime"]) as name:
        run = [*store.command, "run", "--isolation", "chroot", "--user", "1000", name, "--", *command]
        started = time.monotonic()
        done = subprocess.run(run, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - started
    print(f"`{' '.join(command)}`: exit code {done.returncode} after {seconds:.1f} s\n")
    print("```\n" + done.stdout.strip() + "\n```\n", flush=True)


def quick_start(store: Store) -> None:
    print("## The quick start\n")
    with store.container(IMAGES["runtime"]) as name:
        run = [*store.command, "run", "--isolation", "chroot", "--user", "1000", name, "--"]
        words = ["sh", "-c", "id; python3 --version; pip list 2>/dev/null | grep -E '^(torch|deepspeed|numpy) '"]
        facts = subprocess.run([*run, *words], check=True, text=True, capture_output=True).stdout
        started = time.monotonic()
        done = subprocess.run([*run, *QUICK_START], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seconds = time.monotonic() - started
    print(f"`{' '.join(QUICK_START)}`: exit code {done.returncode} after {seconds:.0f} s\n")
    print("```\n" + facts + done.stdout.strip() + "\n```\n", flush=True)


def stop(store: Store) -> None:
    print("## docker stop, and the same command again\n")
    with store.container(IMAGES["runtime"]) as name:
        root = store.buildah("mount", name)
        settings = json.loads(store.buildah("inspect", "--type", "image", IMAGES["runtime"]))["Docker"]["config"]
        # What a container engine does: its own process numbers and mounts, the image's files, user and environment.
        script = 'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && root=$1 && shift && exec chroot '
        script += '--userspec=1000:1000 "$root" env --ignore-environment --chdir=/swinv2 "$@"'
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", root]
        command = [*own, *settings["Env"], *settings["Entrypoint"], *QUICK_START]
        for extra in ([], ["--steps", "30"]):
            first = not extra
            print(f"`{' '.join([*QUICK_START, *extra])}`\n\n```")
            process = subprocess.Popen([*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="")
                if first and re.search(r" step 10/", line):
                    print(">>> SIGTERM to process 1 of the container")
                    psutil.Process(process.pid).children()[0].send_signal(signal.SIGTERM)
            print(f"```\n\nexit code {process.wait()}\n", flush=True)


def build_target(store: Store, arguments: argparse.Namespace, target: str) -> None:
    """Build it, and print a row of the table."""
    is_test, image = target == "test", IMAGES[target]
    options = ["--file", str(REPOSITORY / "docker" / "Dockerfile.cpu"), "--target", target, "--tag", image]
    options += [f"--build-arg=BASE={BASE}", f"--build-arg=PINS={arguments.pins}"]
    options += [f"--volume={mount}" for mount in arguments.mount]
    options += [f"--build-arg=EXTRAS={arguments.extras}"] if is_test else []
    options += ["--secret", f"id=pip,src={arguments.pip_conf}"] if arguments.pip_conf else []
    pip_args = f"{arguments.pip_args} {arguments.test_packages if is_test else ''}".strip()
    options += [f"--build-arg=PIP_ARGS={pip_args}"] if pip_args else []
    seconds = timed(lambda: store.build(REPOSITORY, *options))
    print(f"| target `{target}` | {seconds:.0f} | {size(store, image)} |", flush=True)


def tests(store: Store, arguments: argparse.Namespace) -> None:
    print("## Tests\n\n| | s | size |\n|---|---|---|")
    build_target(store, arguments, "test")
    words = [*TESTS, *(f"--ignore={path}" for path in arguments.ignore)]
    with store.container(IMAGES["test"]) as name:
        run = [*store.command, "run", "--isolation", "chroot", "--user", "1000", name, "--", *words]
        done = subprocess.run(run, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"\n`{' '.join(words)}`: exit code {done.returncode}\n")
    print("```\n" + "\n".join(done.stdout.strip().splitlines()[-25:]) + "\n```\n", flush=True)


def size(store: Store, image: str) -> str:
    """Of all files in it, not compressed."""
    return str(json.loads(store.buildah("images", "--json", image))[0]["size"])


def timed(action: Callable[[], None]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
