"""How far a command is, on stderr, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, rate_of: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar to call with (done, total), gone when the block ends.

    It is shown from the first call on: by then workers have been forked, and from one thread.

    Args:
        rate_of: what to say the number of, a second; by default no rate is shown.
    """
    rate = [TextColumn("{task.fields[rate]}")] if rate_of else []
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), *rate, TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("", rate="")

    def show(done: int, total: int) -> None:
        if not progress.live.is_started:
            progress.reset(task, total=total, completed=done)  # what an earlier command did is no speed of this
            progress.start()
        speed = progress.tasks[0].speed
        progress.update(task, completed=done, total=total, rate=f"{speed:.0f} {rate_of}/s" if speed else "")

    try:
        yield show
    finally:
        progress.stop()
