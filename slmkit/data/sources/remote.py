"""Files at URLs through `fsspec`, read block by block, with nothing stored."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar, cast

from slmkit.config import UserError
from slmkit.data.sources.documents import PIECE
from slmkit.data.sources.files import File, kind_of, listed
from slmkit.data.sources.folders import Chosen, choose
from slmkit.hub import NetworkError, network

BLOCK = 1 << 23  # bytes per request
STALLED = 20.0  # seconds without data after which a plain http connection counts as broken
T = TypeVar("T")


def is_url(path: str) -> bool:
    return "://" in path


def find_remote(url: str, kinds: Sequence[str], split: str) -> tuple[list[File], list[Chosen]]:
    """The file at a URL, or those of a folder, selected as by `choose`.

    Raises `UserError` if nothing there can be read, and `NetworkError`.
    """
    system, path = _file_system(url)
    if kind_of(_without_query(url)) in kinds:
        return [_remote_file(system, path, url)], []
    with network(url):
        inside = {name.removeprefix(path).lstrip("/"): name for name in system.find(path)}
    if not inside:
        raise UserError(f"{url}: no {listed(kinds)} file there (all but .parquet and .arrow also as .gz or .zst)")
    chosen = choose(url, inside, kinds, split)
    names = [inside[name] for name in chosen.names]
    return [_remote_file(system, name, system.unstrip_protocol(name)) for name in names], [chosen]


def remote_file(url: str) -> File:
    return _remote_file(*_file_system(url), url)


def _remote_file(system: Any, path: str, url: str) -> File:
    return File(_without_query(url), lambda: _opened(system, path, url), lambda: _described(system, path, url))


def _without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith("http") else url


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise UserError(f"{url}: reading from URLs needs fsspec: pip install slmkit[hub]") from None
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
            options = {"client_kwargs": {"timeout": timeout}}
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except ImportError as error:
        raise UserError(f"{url}: {protocol}:// needs one more package: {error}") from None
    except ValueError:
        raise UserError(f"{url}: unknown kind of URL {protocol}://") from None


def _opened(system: Any, path: str, url: str) -> BinaryIO:
    with network(url):
        stream = system.open(path, "rb", block_size=BLOCK)
    return cast(BinaryIO, io.BufferedReader(_Stream(stream, url), PIECE))


def _described(system: Any, path: str, url: str) -> dict[str, Any]:
    with network(url):
        info = system.info(path)
    version = (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("ETag") or info.get("etag")
    return {"path": url, "bytes": info.get("size"), "version": version}


class _Stream(io.RawIOBase):
    """A remote file whose errors are `NetworkError`s, so that they are distinct from damage in the file.

    An end before the size that the server gave is also one.
    """

    def __init__(self, stream: Any, url: str) -> None:
        self.stream, self.url, self.place = stream, url, 0
        self.size: int | None = getattr(stream, "size", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda: self.stream.read(len(buffer)))
        buffer[: len(data)] = data
        self.place += len(data)
        if not data and len(buffer) and self.size is not None and self.place < self.size:
            raise NetworkError(f"{self.url}: the connection broke: {self.place:,} of {self.size:,} bytes came")
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # `UserError` if the size is unknown
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence, self.size)
        if base is None:
            raise UserError(f"{self.url}: the server does not tell the size of the file; download it first")
        place = base + offset
        try:
            self._try(lambda: self.stream.seek(place))
        except NetworkError as error:
            if not isinstance(error.__cause__, ValueError) or place < self.place:
                raise
            self._read_up_to(place)  # the server does not support byte ranges
        self.place = place
        return place

    def tell(self) -> int:
        return self.place

    def close(self) -> None:
        self.stream.close()
        super().close()

    def _read_up_to(self, place: int) -> None:
        while self.place < place and (data := self._try(lambda: self.stream.read(min(BLOCK, place - self.place)))):
            self.place += len(data)

    def _try(self, work: Callable[[], T]) -> T:
        with network(self.url):
            return work()


FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds


@dataclass
class RetryPolicy:
    """Waits between retries, up to `retry_for` seconds in all without success."""

    retry_for: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = logging.getLogger(__name__).warning
    has_read: bool = False
    tries: int = field(default=0, init=False)
    failing_since: float = field(default=0.0, init=False)

    def wait(self, error: NetworkError) -> None:
        """Wait for the next try. Raises `UserError` if the error is permanent or the time is over."""
        if error.lasting and not self.has_read:
            raise UserError(str(error)) from None
        if self.tries == 0:
            self.failing_since = self.now()
        # With random jitter, so that many processes do not retry at once.
        delay = min(FIRST_WAIT * 2**self.tries, LONGEST_WAIT) * random.uniform(1, 1.25)
        delay = max(delay, error.retry_after)
        self.tries += 1
        failing = self.now() - self.failing_since
        if failing + delay > self.retry_for:
            raise UserError(f"{error}; given up after {self.tries} tries in {failing:.0f} s (retry_for)") from None
        self.say(f"{error}; try {self.tries + 1} in {delay:.0f} s")
        self.sleep(delay)

    def succeeded(self) -> None:
        self.tries, self.has_read = 0, True

    def until_done(self, work: Callable[[], T]) -> T:
        """The result of `work`, retried while it raises `NetworkError`. Raises `UserError` as `wait` does."""
        while True:
            try:
                result = work()
            except NetworkError as error:
                self.wait(error)
            else:
                self.tries = 0
                return result
