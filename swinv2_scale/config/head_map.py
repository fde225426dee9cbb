"""Which old class each new class takes its weights from."""

from __future__ import annotations

from pathlib import Path

from swinv2_scale.errors import WeightsError


def read_head_map(path: str | Path, num_old: int, num_new: int) -> tuple[int, ...]:
    """Read a text file of one number a line, as Microsoft's map22kto1k.txt.

    Returns:
        the old class of each of ``num_new``.

    Raises:
        WeightsError: missing, not numbers, another count than ``num_new``, or a number outside the old classes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
        numbers = tuple(int(line) for line in lines)
    except (OSError, ValueError) as error:
        raise WeightsError(f"the head map {path} can't be read: {error}", "one class number a line") from None
    if len(numbers) != num_new:
        raise WeightsError(f"the head map {path} has {len(numbers)} lines, the model has {num_new} classes")
    outside = [number for number in numbers if not 0 <= number < num_old]
    if outside:
        raise WeightsError(f"the head map {path} names class {outside[0]}; the file's head has 0..{num_old - 1}")
    return numbers
