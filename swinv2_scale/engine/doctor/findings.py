"""What the checks of all processes found, as the rows of one table."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

from swinv2_scale.errors import ScaleError

T = TypeVar("T")
_MOST_NAMED = 3


class State(IntEnum):
    """The larger, the worse."""

    OK = 0
    WARNING = 1
    PROBLEM = 2


@dataclass(frozen=True)
class Finding:
    """What one check found in one process, or in all of them.

    Attributes:
        check: a row's name; findings of the same name from several processes become one row.
        advice: what to do about it, where it isn't OK.
        amount: of something there should be enough of: where all is well, the process with the least speaks for all.
        facts: what has to be the same in every process that looks: ``{"torch": "2.11.0"}``.
    """

    check: str
    found: str
    state: State = State.OK
    advice: str = ""
    amount: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, found, State.WARNING, advice)


def problem(check: str, found: str, advice: str = "") -> Finding:
    return Finding(check, found, State.PROBLEM, advice)


def of_error(check: str, error: Exception) -> Finding:
    """A check that raised: the user's world, or a bug of ours."""
    if isinstance(error, ScaleError):
        return problem(check, error.message, error.next_step)
    if isinstance(error, TimeoutError):
        return problem(check, str(error), "a disk or a server that this check asks doesn't answer: try it by hand")
    return problem(check, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Process:
    """What one process found."""

    rank: int
    local_rank: int
    host: str
    findings: tuple[Finding, ...]


_Found = list[tuple[Process, Finding]]


def rows(processes: Sequence[Process], advice: Mapping[str, str]) -> list[Finding]:
    """One finding for each check: the worst, with the ranks that it is from where others found something else.

    Args:
        advice: by check: what to do where facts differ.
    """
    by_check: dict[str, _Found] = defaultdict(list)
    for process in processes:
        for finding in process.findings:
            by_check[finding.check].append((process, finding))
    return [_row(found, advice.get(check, "")) for check, found in by_check.items()]


def _row(found: _Found, advice: str) -> Finding:
    state = max(finding.state for _, finding in found)
    first = next(finding for _, finding in found if finding.state is state)
    if state < State.PROBLEM and (text := _differing(found)):
        return problem(first.check, text, advice)
    if state is State.OK:
        return min((finding for _, finding in found), key=lambda finding: finding.amount or 0.0)
    groups = _grouped([(process, finding.found) for process, finding in found if finding.state is state])
    if list(map(len, groups.values())) == [len(found)]:
        return first
    texts = [f"{named(ranks)}: {text}" for text, ranks in groups.items()]
    more = f"; and {len(texts) - _MOST_NAMED} others" if texts[_MOST_NAMED:] else ""
    return replace(first, found="; ".join(texts[:_MOST_NAMED]) + more)


def _differing(found: _Found) -> str:
    """Which facts aren't the same everywhere: those of the fewest, and on which ranks; empty where all are."""
    keys = dict.fromkeys(key for _, finding in found for key in finding.facts)
    texts = []
    for key in keys:
        groups = _grouped([(process, finding.facts.get(key, "nothing")) for process, finding in found])
        if len(groups) > 1:
            *rare, (most, _) = sorted(groups.items(), key=lambda item: (len(item[1]), -item[1][0].rank))
            others = [f"{value or 'empty'} on {named(ranks)}" for value, ranks in rare[:_MOST_NAMED]]
            texts.append(f"{key} is {', '.join(others)}, {most or 'empty'} on the others")
    more = f"; and {len(texts) - _MOST_NAMED} more differences" if texts[_MOST_NAMED:] else ""
    return "; ".join(texts[:_MOST_NAMED]) + more


def _grouped(pairs: Sequence[tuple[Process, str]]) -> dict[str, list[Process]]:
    groups: dict[str, list[Process]] = defaultdict(list)
    for process, text in pairs:
        groups[text].append(process)
    return groups


def worst(findings: Sequence[Finding]) -> Finding:
    """The first of the worst ones, with how many are like it."""
    state = max(finding.state for finding in findings)
    alike = [finding for finding in findings if finding.state is state]
    more = f" (and {len(alike) - 1} more)" if state is not State.OK and alike[1:] else ""
    return replace(alike[0], found=alike[0].found + more)


def named(processes: Sequence[Process]) -> str:
    """``rank 3 on node1``, ``ranks 8, 9, 10 and 5 more``."""
    ranks = [str(process.rank) for process in processes[:_MOST_NAMED]]
    hosts = {process.host for process in processes}
    more = f" and {len(processes) - _MOST_NAMED} more" if processes[_MOST_NAMED:] else ""
    word = "rank" if len(processes) == 1 else "ranks"
    return f"{word} {', '.join(ranks)}{more}" + (f" on {hosts.pop()}" if len(hosts) == 1 else "")


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def answers(actions: Mapping[str, Callable[[], T]], timeout_s: float) -> dict[str, T | Exception]:
    """What each action returned or raised, a TimeoutError for those that didn't return in time; they run side by side.

    A dead network disk lets nobody go, not even by a signal: the threads of such actions are left behind, and the
    process must then end by ``os._exit``.
    """
    queues: dict[str, SimpleQueue[T | Exception]] = {}
    for name, action in actions.items():
        queues[name] = SimpleQueue()
        Thread(target=_run, args=(action, queues[name]), name=name, daemon=True).start()
    end = time.monotonic() + timeout_s
    found: dict[str, T | Exception] = {}
    for name, queue in queues.items():
        try:
            found[name] = queue.get(timeout=max(end - time.monotonic(), 0.0))
        except Empty:
            found[name] = TimeoutError(f"no answer within {timeout_s:.0f} s")
    return found


def _run(action: Callable[[], T], queue: SimpleQueue[T | Exception]) -> None:
    try:
        queue.put(action())
    except Exception as error:
        queue.put(error)


def answer(action: Callable[[], T], timeout_s: float) -> T:
    """What one action returns, if it does in time.

    Raises:
        Exception: whatever it raises, or TimeoutError.
    """
    found = answers({"": action}, timeout_s)[""]
    if isinstance(found, Exception):
        raise found
    return found
