"""What a result says about where it was made."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import psutil


def describe_machine(gpu: str = "no GPU used") -> str:
    """CPU, cores, memory, GPU."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {gpu}"


def describe_versions(*packages: str) -> str:
    """``Python 3.11.7, torch 2.15.0, ..``"""
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)


def hardware() -> str:
    """In names of results: ``epyc-2core``."""
    words = re.findall(r"[a-z0-9]+", _cpu_model().lower())
    name = next((word for word in words if word not in ("amd", "intel", "r", "tm")), "cpu")
    return f"{name}-{len(os.sched_getaffinity(0))}core"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
