"""Work on many things in processes, with the results in the order of the things."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from swinv2_scale.data.forks import Context
from swinv2_scale.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
#: Results and work that wait for each other, for each process; more would only take memory.
_WAITING = 4


def in_order(function: Callable[[T], R], things: Iterable[T], processes: int) -> Generator[R, None, None]:
    """``function`` of each thing. The processes start with the first result that is asked for.

    Args:
        function: can be pickled, if there is more than one process.

    Raises:
        DataError: a process was killed.
        Exception: whatever ``function`` raises.
    """
    if processes == 1:
        yield from map(function, things)
        return
    # Forked: a worker has everything imported at once, and doesn't run the main script again.
    pool = ProcessPoolExecutor(processes, Context(), initializer=_begin)
    waiting: deque[Future[R]] = deque()
    try:
        for thing in things:
            waiting.append(pool.submit(function, thing))
            if len(waiting) == _WAITING * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed: out of memory, or a file that crashes its decoder",
            "try fewer --processes; one process finds such a file",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a worker: stop signals are the parent's business, and its death is the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
