"""Pages that hold what a script found, between marks."""

from __future__ import annotations

from collections.abc import Sequence


def filled(page: str, start: str, end: str, lines: Sequence[str]) -> str:
    """The page with these lines, and nothing else, between two marks that it has."""
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    assert rest, f"the page has no place for {start}"
    return "\n".join([before + start, "", *lines, "", end]) + after
