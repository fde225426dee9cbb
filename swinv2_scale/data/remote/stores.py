"""What is particular to the stores that shards lie in: connections, one HTTP range, and which errors may pass.

fsspec's own caches are off, and as far as possible the retries of the libraries below it: files.py's are what counts.
"""

from __future__ import annotations

import errno
import logging
import re
from importlib import import_module
from typing import Any, cast
from urllib.parse import urlsplit

from swinv2_scale.data.remote.pipe import PIPE_PREFIX
from swinv2_scale.errors import DataError, SampleError

_SCHEMES = ("http", "https", "s3", "gs")
_NO_CACHES = {"use_listings_cache": False, "skip_instance_cache": True}
_PASSING_STATUS = (408, 425, 429)
#: s3fs says with these that the request itself is refused; the others may pass.
_REFUSED = (errno.EACCES, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSYS, errno.EPERM, errno.EREMCHG)
#: What the libraries raise, besides OSErrors, when an answer doesn't come or breaks off. By name, because none of them
#: need be installed.
_BROKEN_ANSWERS = {
    "ClientPayloadError",  # aiohttp
    "ClientResponseError",  # no HTTP
    "ServerDisconnectedError",
    "HTTPClientError",  # botocore
    "ConnectionError",
    "IncompleteReadError",
    "ResponseParserError",
    "TransportError",  # google.auth
}
#: None is ever garbage: collected in a forked child it would wait a second for a thread of its parent.
_MADE: list[Any] = []
_CONTENT_RANGE = re.compile(r"bytes (?:(?P<first>\d+)-(?P<last>\d+)|\*)/(?P<size>\d+|\*)")


class HttpStatusError(Exception):
    """A server answered with a status that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.code = status


def without_secrets(location: str) -> str:
    """A location for messages and logs: a URL without user, password and query, which may be keys."""
    if "://" not in location or location.startswith((PIPE_PREFIX, "file:")):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def new_filesystem(location: str, timeout_s: float) -> Any:
    """An fsspec filesystem for the store of a URL; no request is made yet.

    Raises:
        DataError: a kind of URL that isn't read, or the packages for it aren't installed.
    """
    scheme = urlsplit(location).scheme
    if scheme not in _SCHEMES:
        raise DataError(f"{without_secrets(location)}: shards are read from {', '.join(_SCHEMES)}, pipe: and paths")
    try:
        import aiohttp
        import fsspec

        silence = aiohttp.ClientTimeout(total=None, connect=timeout_s, sock_connect=timeout_s, sock_read=timeout_s)
        filesystem: Any
        if scheme == "s3":
            retries = {"total_max_attempts": 1, "mode": "standard"}
            limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": retries}
            filesystem = import_module("s3fs").S3FileSystem(config_kwargs=limits, **_NO_CACHES)
            filesystem.retries = 1  # tries, in fact
        elif scheme == "gs":
            # Not what fsspec would take, which talks gRPC too: that doesn't survive a fork. It asks six times itself,
            # which can't be turned off, and logs a traceback each time.
            filesystem = import_module("gcsfs").core.GCSFileSystem(requests_timeout=silence, **_NO_CACHES)
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        else:
            options = {"timeout": silence, "trust_env": True}  # HTTPS_PROXY, NO_PROXY, .netrc
            filesystem = fsspec.filesystem(scheme, client_kwargs=options, **_NO_CACHES)
    except ImportError as error:
        raise DataError(
            f"{without_secrets(location)}: {scheme}:// needs a package that isn't installed ({error})",
            "pip install 'swinv2-scale[remote]'",
        ) from error
    _MADE.append(filesystem)
    return filesystem


def http_range(filesystem: Any, url: str, start: int, length: int) -> tuple[bytes | None, int]:
    """(bytes, size of the whole file); None for bytes that can't be had alone, -1 for a size that isn't said.

    fsspec's own cat_file takes a whole file for a range of it and doesn't tell.

    Raises:
        FileNotFoundError: status 404 or 410.
        HttpStatusError: another one that is no success.
        aiohttp.ClientError, OSError, EOFError: no whole answer.
    """
    from fsspec.asyn import sync

    async def ask() -> tuple[bytes | None, int]:
        session = await filesystem.set_session()
        # A compressed answer would have ranges of the compressed bytes.
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        async with session.get(filesystem.encode_url(url), headers=headers) as answer:
            if answer.status in (404, 410):
                raise FileNotFoundError(f"HTTP status {answer.status}")
            said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status == 416 and said and said["size"] != "*":
                return None, int(said["size"])
            if answer.status >= 400:
                raise HttpStatusError(answer.status)
            if answer.status != 206:
                size = -1 if answer.content_length is None else answer.content_length
                return (await answer.content.readexactly(length) if start == 0 and size == length else None), size
            if not said or said["first"] is None or int(said["first"]) != start:
                raise EOFError(f"the answer to {headers['Range']} is {answer.headers.get('Content-Range')!r}")
            data = await answer.content.readexactly(max(0, min(length, int(said["last"]) + 1 - start)))
            return data, -1 if said["size"] == "*" else int(said["size"])

    return cast("tuple[bytes | None, int]", sync(filesystem.loop, ask))


def may_pass(error: Exception) -> bool:
    """Whether asking again makes sense."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, OSError):
        if str(error).startswith("Forbidden"):  # gcsfs's 403
            return False
        return not isinstance(error, (FileNotFoundError, PermissionError)) and error.errno not in _REFUSED
    return isinstance(error, EOFError) or any(base.__name__ in _BROKEN_ANSWERS for base in type(error).__mro__)


def cause(error: Exception) -> str:
    """One line for people. fsspec's time-outs say nothing themselves; what is no HTTP is quoted whole by aiohttp."""
    if _status(error) is not None:
        return f"HTTP status {_status(error)}"
    text = " ".join((str(error) or str(error.__cause__ or "") or type(error).__name__).split())
    text = re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)  # queries may be keys, as in ``without_secrets``
    return text if len(text) <= 1200 else f"{text[:200]} .. {text[-1000:]}"


def _status(error: Exception) -> int | None:
    is_status = isinstance(error, HttpStatusError) or type(error).__name__ == "HttpError"  # gcsfs's
    return int(getattr(error, "code", None) or 0) if is_status else None


def failure(location: str, error: Exception, tries: int) -> DataError:
    """What to raise after so many tries, with advice that fits the last error; a file that is gone is a damaged one."""
    if isinstance(error, FileNotFoundError) and not location.startswith(PIPE_PREFIX):
        return SampleError(
            f"{without_secrets(location)}: {cause(error)}", "correct data.train / data.validation, or put it there"
        )
    if location.startswith(PIPE_PREFIX):
        step = "run the command by hand to see what it does"
    elif may_pass(error):
        step = (
            "see whether the store can be reached from this node; data.remote.retries and timeout_s say how long to try"
        )
    else:
        step = "check the address and what this job may read: credentials in its environment, a signed URL's expiry"
    asked = f" (asked {tries} times)" if tries > 1 else ""
    return DataError(f"{without_secrets(location)}: {cause(error)}{asked}", step)
