"""How the kernels of the ``triton`` backend are launched: blocks, warps and stages by what they work on.

Untuned: nothing here has run on a GPU. These are the launches that compile for sm_90 without spilling registers
(tests/unit/models/test_triton_attention.py). ``benchmarks/gpu_attention.py`` measures others on a GPU and prints the
rows of ``LAUNCHES`` that were fastest there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

#: 8 programs for each of an H200's 132 multiprocessors.
NUM_PROGRAMS = 1056


def block_length(number: int) -> int:
    """The power of two that ``number`` fits in, at least 16: what a product of blocks takes."""
    return max(16, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class Launch:
    """Of one kernel."""

    block_m: int  # queries a block, a power of two
    block_n: int  # keys a block, a power of two
    num_warps: int
    num_stages: int

    def within(self, num_tokens: int) -> Launch:
        """No block larger than a tile needs."""
        cap = block_length(num_tokens)
        return replace(self, block_m=min(self.block_m, cap), block_n=min(self.block_n, cap))


@dataclass(frozen=True)
class Launches:
    """Of all kernels, and how the table's gradient is cut: into enough programs, within so many bytes of scratch."""

    forward: Launch
    query_gradient: Launch
    key_gradient: Launch
    table_gradient: Launch
    num_programs: int = NUM_PROGRAMS
    max_scratch_bytes: int = 256 * 2**20

    def as_numbers(self) -> list[int]:
        """As an argument of a torch operator."""
        kernels = (self.forward, self.query_gradient, self.key_gradient, self.table_gradient)
        return [*(n for launch in kernels for n in astuple(launch)), self.num_programs, self.max_scratch_bytes]

    @staticmethod
    def from_numbers(numbers: Sequence[int]) -> Launches:
        kernels = [Launch(*numbers[start : start + 4]) for start in range(0, 16, 4)]
        return Launches(kernels[0], kernels[1], kernels[2], kernels[3], *numbers[16:])


#: (largest head_dim, bytes of an element, fewest tokens of a tile) -> launches; the first that fits is taken.
#: Float32 is multiplied without a matrix unit. Beyond 32 channels its gradients spill registers: right, but slow.
LAUNCHES: tuple[tuple[tuple[int, int, int], Launches], ...] = (
    ((64, 2, 0), Launches(Launch(128, 64, 8, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3))),
    ((128, 2, 0), Launches(Launch(64, 64, 4, 2), Launch(64, 64, 8, 2), Launch(32, 64, 8, 2), Launch(64, 64, 8, 2))),
    ((32, 4, 0), Launches(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))),
    ((128, 4, 0), Launches(Launch(32, 32, 8, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(32, 32, 4, 1))),
)


def launches_for(head_dim: int, itemsize: int, num_tokens: int) -> Launches:
    """The row of the table for tiles of ``num_tokens``; head_dim at most 128."""
    return next(
        launches
        for (largest_dim, size, fewest), launches in LAUNCHES
        if head_dim <= largest_dim and itemsize == size and num_tokens >= fewest
    )
