"""Says which rank a job waits for, and ends it: a collective that waits for a dead rank cannot be interrupted.

Each process has two threads beside its main one. One writes a beat onto the job's board about once a second and reads
what others found; it is stuck as soon as the board's keeper is. The other counts how long the main thread has been in
one phase, and ends the process when that is too long, whatever else hangs.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NoReturn, TypeVar

from swinv2_scale import dist
from swinv2_scale.config.run import ClusterConfig
from swinv2_scale.errors import ExitCode, PeerLostError
from swinv2_scale.telemetry.console import log

T = TypeVar("T")

PERIOD_S = 1.0
#: A rank whose beat is still the same after so long is silent: three beats, for one that gets little of a busy machine.
SILENCE_S = 3.0
#: What the board hasn't answered by then it won't answer.
ANSWER_S = 2.0
#: So long a rank that knows who is missing leaves the others to read it, before its end becomes their error.
FAREWELL_S = 2.0
_FINDING = "finding"
_MOST_NAMED = 4


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: of this beat; grows for as long as the process runs.
        phases: how many its main thread has entered; all ranks enter the same ones.
        step: the one being worked on, 0 before the first.
    """

    number: int
    phases: int
    step: int
    phase: str
    host: str

    def __str__(self) -> str:
        return f"at step {self.step} ({self.phase})" if self.step else f"at the start ({self.phase})"


def missing_ranks(before: Sequence[Beat], after: Sequence[Beat]) -> str:
    """Whom everybody waits for, as a sentence: the silent ranks, else those that are behind the others.

    Args:
        before, after: every rank's last beat, read SILENCE_S apart.
    """
    pairs = enumerate(zip(before, after, strict=True))
    silent = [rank for rank, (old, new) in pairs if old.number == new.number]
    if silent:
        return _each(silent, after, "no longer answers, last seen")
    first, last = (pick(beat.phases for beat in after) for pick in (max, min))
    if last < first:
        return _each([rank for rank, beat in enumerate(after) if beat.phases == last], after, "is still")
    return f"all {len(after)} ranks answer, and all are {after[0]}"


def _each(ranks: Sequence[int], beats: Sequence[Beat], what: str) -> str:
    named = [f"rank {rank} on {beats[rank].host} {what} {beats[rank]}" for rank in ranks[:_MOST_NAMED]]
    return "; ".join(named) + (f"; and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else "")


@dataclass(frozen=True)
class _Place:
    """Where the main thread is."""

    phases: int
    step: int
    phase: str
    limit_s: float


class Watchdog:
    """Watches the main thread of this process, and with it the other ranks.

    With one process nobody can be waited for: it only notes the stacks and goes on.

    Args:
        log_file: of this rank; gets the stacks of all threads.
        record_end: writes down an exit code and why, before this process ends here.
    """

    def __init__(
        self, cluster: ClusterConfig, log_file: Path, record_end: Callable[[int, str], None] = lambda code, why: None
    ) -> None:
        self._cluster, self._log_file, self._record_end = cluster, log_file, record_end
        self._place = _Place(0, 0, "starting", cluster.timeout_s)
        self._host = socket.gethostname()
        self._board: dist.Board | None = None
        self._num_beats = 0
        self._keeper: Beat | None = None  # rank 0, as last seen
        self._told: str | None = None  # what another rank found
        self._errands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Called by all ranks, once they have joined."""
        if dist.world_size() > 1:
            board = dist.Board()
            self._beat(board)
            dist.barrier()  # from here on every rank has a beat
            self._keeper = self._read_beats(board, 1)[0]  # whose host is named, should it be silent soon
            self._board = board
            self._threads.append(threading.Thread(target=self._run_errands, args=(board,), name="beats", daemon=True))
        self._threads.append(threading.Thread(target=self._watch, name="watchdog", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Say and do nothing from now on; safe to call twice, and before ``start``."""
        self._is_over.set()
        self._errands.put(None)
        for thread in self._threads:
            thread.join(PERIOD_S)  # at once, but for a board that doesn't answer

    def enter(self, phase: str, step: int = 0, is_steady: bool = False) -> None:
        """The main thread begins something that all ranks do now.

        Args:
            is_steady: one of many alike, for which ``cluster.step_timeout_s`` is enough; else ``timeout_s``.
        """
        limit_s = self._cluster.step_timeout_s if is_steady else self._cluster.timeout_s
        self._place = _Place(self._place.phases + 1, step, phase, limit_s)

    def each(self, items: Iterator[T], phase: str, step: int) -> Iterator[T]:
        """The items, as many on every rank, with the time of a phase for each."""
        self.enter(phase, step)
        for item in items:
            yield item
            self.enter(phase, step)

    def who_is_missing(self) -> str:
        """A sentence, after some seconds of asking; the main thread calls it when a collective has failed."""
        self._is_over.set()  # the main thread is awake and will end the process
        if self._board is None:
            return "it ended before all ranks had started"
        finding = self._find()
        if dist.world_size() > 2:
            self._tell(finding)
        return finding

    # The thread of the board

    def _run_errands(self, board: dist.Board) -> None:
        """Beats, and what the other threads want to be read or written."""
        try:
            while True:
                try:
                    errand = self._errands.get(timeout=PERIOD_S)
                except Empty:
                    pass
                else:
                    if errand is None:
                        return
                    errand()
                self._beat(board)
                self._keeper = self._read_beats(board, 1)[0]
                found = board.read([_FINDING])
                self._told = found[0] if found else None
        except RuntimeError:
            log().debug("the job's board has gone", exc_info=True)

    def _beat(self, board: dist.Board) -> None:
        place = self._place
        self._num_beats += 1
        beat = Beat(self._num_beats, place.phases, place.step, place.phase, self._host)
        board.write(str(dist.rank()), json.dumps(astuple(beat)))

    def _read_beats(self, board: dist.Board, num_ranks: int) -> list[Beat]:
        notes = board.read([str(rank) for rank in range(num_ranks)])
        assert notes is not None, "start() lets nobody go on before all have written theirs"
        return [Beat(*json.loads(note)) for note in notes]

    # The other threads

    def _ask(self, errand: Callable[[], T]) -> T | None:
        """What an errand of the board's thread brings; None if the board doesn't answer."""
        answers: SimpleQueue[T] = SimpleQueue()
        self._errands.put(lambda: answers.put(errand()))
        try:
            return answers.get(timeout=ANSWER_S)
        except Empty:
            return None

    def _find(self) -> str:
        """Who is missing: what another rank has found, or what the beats say."""
        board = self._board
        assert board is not None
        before = self._ask(lambda: self._read_beats(board, dist.world_size()))
        if before and not self._told:
            time.sleep(SILENCE_S)
            after = self._ask(lambda: self._read_beats(board, dist.world_size()))
            if after and not self._told:
                return missing_ranks(before, after)
        if self._told:
            return self._told
        if dist.rank() == 0 or self._keeper is None:
            return f"the job's store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} no longer answers"
        return _each([0], [self._keeper], "no longer answers, last seen")

    def _tell(self, finding: str) -> None:
        """Let the others end with the same finding, those that still can."""
        board = self._board
        assert board is not None

        def write() -> bool:
            board.write(_FINDING, finding)
            return True

        if self._told or self._ask(write):
            time.sleep(FAREWELL_S)

    def _watch(self) -> None:
        place, spent_s, last = self._place, 0.0, time.monotonic()
        while not self._is_over.wait(PERIOD_S):
            now = time.monotonic()
            # While all of the process was suspended (Ctrl-Z, a scheduler), the phase didn't go on either.
            spent_s += min(now - last, 5 * PERIOD_S)
            last = now
            if self._place is not place:
                place, spent_s = self._place, 0.0
            if self._told or spent_s > place.limit_s:
                if self._board is None:
                    log().warning("%.0f s %s; the stacks are in %s", spent_s, self._here, self._log_file)
                    self._note_stacks(f"{spent_s:.0f} s {self._here}")
                    spent_s = float("-inf")  # once a phase
                else:
                    self._end_unless_it_goes_on(place, spent_s)

    def _end_unless_it_goes_on(self, place: _Place, spent_s: float) -> None:
        here = self._here
        finding = self._find()
        goes_on = self._place is not place and not self._told
        if goes_on or self._is_over.is_set():
            return
        self._tell(finding)
        self._end(
            PeerLostError(
                f"rank {dist.rank()} on {self._host} has been {here} for {spent_s:.0f} s: {finding}",
                f"{self._log_file} has the stacks of this rank; start the job again, it resumes. If steps take so long "
                "when all is well, raise cluster.step_timeout_s (cluster.timeout_s for the first one, validation, "
                "checkpoints)",
            )
        )

    @property
    def _here(self) -> Beat:
        place = self._place
        return Beat(0, place.phases, place.step, place.phase, self._host)

    def _note_stacks(self, why: str) -> None:
        try:
            with self._log_file.open("a", encoding="utf-8") as file:  # the main thread may hold the logger's lock
                print(f"{time.strftime('%F %T')} {why}\nthe stacks of all threads:", file=file, flush=True)
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback()

    def _end(self, error: PeerLostError) -> NoReturn:
        """The main thread can't be raised into: the process ends here, with what it can still say."""
        # A disk or a pipe may be what hangs.
        threading.Timer(ANSWER_S, os._exit, (int(ExitCode.PEER_LOST),)).start()
        print(error.report, file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()  # they hold this process's connections too
        self._note_stacks(f"ended by the watchdog: {error}")
        self._record_end(error.exit_code, error.message)
        os._exit(int(ExitCode.PEER_LOST))
