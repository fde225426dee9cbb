"""Worker processes that are forked again if a fork hung."""

from __future__ import annotations

import socket
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

from swinv2_scale.telemetry.console import log

#: What a child says, and what it waits for before it does anything that others could see.
_READY, _GO = b"r", b"g"
#: A child is ready within milliseconds. So long the first one is waited for, each further one twice as long.
_PATIENCE_S = 5.0


class _Popen(Popen):
    """A fork whose child has begun to run.

    A child gets its parent's memory as it is, and of its threads only the one that forked: a lock that another thread
    held is never released. Python 3.11.7 has one around its list of threads, which children take before anything else
    (python/cpython#112275). gloo's threads take it too, just after a collective, which is when a trainer starts its
    loader workers: one fork in some thousand hung (benchmarks/forks.py), and the rank waited for samples for ever.
    """

    def _launch(self, process_obj: Process) -> None:
        patience_s = _PATIENCE_S
        while not self._begins(process_obj, patience_s):
            self.kill()
            self.wait()
            self.close()
            self.returncode = None
            log().warning("a worker process did not begin to run within %.0f s; forking another one", patience_s)
            patience_s *= 2

    def _begins(self, process_obj: Process, patience_s: float) -> bool:
        """Fork; False if the child hasn't said in time that it runs. One that has died is found by whoever uses it."""
        here, there = process_obj.line = socket.socketpair()
        super()._launch(process_obj)  # type: ignore[misc]  # typeshed has no private methods
        there.close()
        with here:
            here.settimeout(patience_s)
            try:
                here.recv(len(_READY))
                here.sendall(_GO)
            except TimeoutError:
                return False
            except OSError:
                pass
        return True


class Process(ForkProcess):
    line: tuple[socket.socket, socket.socket]

    _Popen = _Popen  # what start() calls

    def run(self) -> None:
        if self._may_go():
            super().run()

    def _may_go(self) -> bool:
        there, here = self.line
        there.close()
        with here:
            try:
                here.sendall(_READY)
                return here.recv(len(_GO)) == _GO
            except OSError:  # the parent has died
                return False


class Context(ForkContext):
    """``fork`` for a process that may have threads."""

    Process = Process
