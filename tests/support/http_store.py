"""A real HTTP server on this machine that serves a folder by byte ranges, and fails as it is told to."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Args:
        status: this one and no content.
        silent_after: so many bytes of the body are sent, then nothing until the store closes; -1: no header either.
        cut_after: the connection is closed after so many bytes of the body.
        reset: the connection is reset instead of answered.
        no_ranges: the whole file with status 200, whatever was asked.
        no_length: as ``no_ranges``, and without Content-Length.
        shift: another range than was asked, by so many bytes, and said so.
        length: Content-Length is this much larger than the body.
    """

    status: int = 0
    silent_after: int | None = None
    cut_after: int | None = None
    reset: bool = False
    no_ranges: bool = False
    no_length: bool = False
    shift: int = 0
    length: int = 0


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None


class HttpStore:
    """A running server.

    Attributes:
        url: of the folder.
        requests: all that came, in their order.
        bytes_sent: of bodies.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.closing = threading.Event()
        self._once: deque[Fault] = deque()
        self._always: Fault | None = None
        handler = type("Handler", (_Handler,), {"store": self, "folder": folder})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def fail(self, *faults: Fault) -> None:
        """The next requests get these, one each; the ones after them are answered well."""
        self._once.extend(faults)

    def fail_always(self, fault: Fault | None) -> None:
        self._always = fault

    def next_fault(self) -> Fault:
        with contextlib.suppress(IndexError):
            return self._once.popleft()
        return self._always or Fault()

    def asked(self) -> Counter[str]:
        """How often each range of whichever file was asked for."""
        return Counter(str(request.range) for request in self.requests)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def http_store(folder: Path) -> Iterator[HttpStore]:
    store = HttpStore(folder)
    try:
        yield store
    finally:
        store.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as real servers have it
    disable_nagle_algorithm = True
    store: HttpStore
    folder: Path

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        asked = self.headers.get("Range")
        self.store.requests.append(Request(self.path, asked))
        fault = self.store.next_fault()
        if fault.reset:
            # Lingering for 0 s makes the kernel send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        if fault.silent_after == -1:
            self.store.closing.wait()
            self._hang_up()
            return
        file = self.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if fault.status or not file.is_file():
            self._say(fault.status or 404, 0)
            return
        data = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if span is None or fault.no_ranges or fault.no_length:
            self._say(200, None if fault.no_length else len(data) + fault.length)
            self._send(data if with_body else b"", fault)
            return
        start, stop = int(span[1]) + fault.shift, min(int(span[2]) + 1 + fault.shift, len(data))
        if start >= len(data):
            self._say(416, 0, f"bytes */{len(data)}")
            return
        self._say(206, stop - start + fault.length, f"bytes {start}-{stop - 1}/{len(data)}")
        self._send(data[start:stop] if with_body else b"", fault)

    def _say(self, status: int, length: int | None, content_range: str = "") -> None:
        self.send_response(status)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def _send(self, body: bytes, fault: Fault) -> None:
        limits = [limit for limit in (fault.silent_after, fault.cut_after) if limit is not None]
        sent = body[: min(limits)] if limits else body
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.wfile.write(sent)
            self.wfile.flush()
            self.store.bytes_sent += len(sent)
        if fault.silent_after is not None:
            self.store.closing.wait()
        if limits or fault.no_length or fault.length:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass
