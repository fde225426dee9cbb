"""What the processes of a job do to themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys, torch
from swinv2_scale import dist
# What glibc begins with, and would raise by what is freed: then it is chance whether a heap can be handed back.
ctypes.CDLL(None).mallopt(-3, 128 * 1024)
if sys.argv[1] == "kept":
    dist.keep_freed_memory()
def step():
    tensors = [torch.ones(4 * 2**20) for _ in range(20)]  # 16 MiB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is told")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    """Without it the system zeroes 320 MiB again: 82 thousand pages of 4 KiB."""

    def faults(case: str) -> int:
        words = [sys.executable, "-c", PROGRAM, case]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 100
    assert faults("as it is") > 10_000
