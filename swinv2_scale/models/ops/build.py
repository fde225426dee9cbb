"""Building the kernels of csrc/, and finding what was built. Nothing builds at import or in a training.

One library holds the kernels of every instruction set, so it is built where there is a compiler and used where there
may be none. Its folder is named after what it depends on: torch, the sources, the flags.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from swinv2_scale.errors import ClusterError

SOURCES = Path(__file__).parent / "csrc"
_LIBRARY = "swinv2_kernels.so"
#: Seconds for one file; the slowest takes 20 on one core.
_TIMEOUT_S = 900

_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
#: -O3 and no errno, so that square roots are instructions. No -ffast-math: a NaN must stay one.
_KERNEL_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
_PORTABLE: dict[str, tuple[str, ...]] = {"portable": ()}
_X86 = {
    **_PORTABLE,
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "amx_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}


def variants() -> dict[str, tuple[str, ...]]:
    """The instruction sets that this kind of machine may have, and the flags of each."""
    return _X86 if platform.machine() in ("x86_64", "AMD64") else dict(_PORTABLE)


def key() -> str:
    """What a library depends on, in a folder's name."""
    content = hashlib.sha256(repr((platform.machine(), _FLAGS, _KERNEL_FLAGS, variants())).encode())
    for path in sorted(SOURCES.iterdir()):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"torch-{torch.__version__}-{content.hexdigest()[:12]}"


def places() -> list[Path]:
    """The folders where libraries are looked for: the environment's own, then the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(sys.prefix) / "lib" / "swinv2_scale" / key(), Path(cache) / "swinv2_scale" / key()]


def find() -> Path | None:
    """The library that was built from these sources for this torch."""
    return next((path for folder in places() if (path := folder / _LIBRARY).is_file()), None)


def compiler() -> str | None:
    """$CXX, or the first that is there."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build() -> Path:
    """Compile the kernels into the first folder of places() that can be written; about a minute on two cores.

    Two at once do the same work, and the later one's file takes the place of the former's. A killed one leaves a folder
    that nobody reads.

    Raises:
        ClusterError: there is no compiler, or it fails; no folder can be written.
    """
    command = compiler()
    if command is None:
        raise ClusterError("no C++ compiler: neither $CXX nor g++, clang++ or c++ is there", "install g++ 11 or newer")
    problems = []
    for folder in places():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as made:
                library = _compile(command, Path(made))
                library.replace(folder / _LIBRARY)
            return folder / _LIBRARY
        except OSError as error:
            problems.append(str(error))
    raise ClusterError(f"the kernels can't be written: {'; '.join(problems)}", "make one of these folders writable")


def _compile(command: str, folder: Path) -> Path:
    """All objects at once, then the library."""
    root = Path(torch.__file__).parent
    includes = (f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    jobs = {
        name: [command, *_FLAGS, "-O2", abi, *includes, "-c", f"{SOURCES}/{name}.cpp"]
        for name in ("attention", "elementwise")
    }
    for name, flags in variants().items():
        defines = (f"-DKERNELS={name}",)
        jobs[name] = [command, *_FLAGS, *_KERNEL_FLAGS, *flags, *defines, "-c", f"{SOURCES}/kernels.cpp"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, ([*words, "-o", f"{folder}/{name}.o"] for name, words in jobs.items())))
    library = folder / _LIBRARY
    # All names are looked up when it is loaded, where a missing one is an error that can be told, not later.
    torch_libraries = (f"-L{root}/lib", "-ltorch_cpu", "-lc10", "-Wl,-z,now")
    _run([command, "-shared", *(f"{folder}/{name}.o" for name in jobs), *torch_libraries, "-o", str(library)])
    return library


def _run(words: list[str]) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)  # noqa: S603  no shell
    except subprocess.TimeoutExpired:
        message = f"`{' '.join(words)}` took more than {_TIMEOUT_S} s"
        raise ClusterError(message, "look at the load of this machine") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        text = "\n".join(lines[:8])
        raise ClusterError(f"the compiler failed:\n{text}\n{' '.join(words)}", "g++ 11 or newer compiles it") from None
