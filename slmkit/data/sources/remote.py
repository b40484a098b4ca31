"""Finds the files of a source: here, at URLs through `fsspec` (read block by block, nothing stored), or on the hub.

`datasets` names the files of a data set (from README and file names; never by a loading script). They are read here
like all others: the same rows streamed or downloaded, with a position exact to the row.
"""

from __future__ import annotations

import io
import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from slmkit.config import UserError, did_you_mean, importing, one_line
from slmkit.data.sources.documents import PIECE
from slmkit.data.sources.files import KINDS, File, kind_of, listed, local_file
from slmkit.data.sources.folders import Chosen, choose, find
from slmkit.data.sources.settings import SourceSettings
from slmkit.files.hub import NetworkError, network

BLOCK = 1 << 23  # bytes per request
STALLED = 20.0  # seconds without data after which a plain http connection counts as broken
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
PREFIX = "hf://datasets/"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
FRONT_MATTER = re.compile(r"\A---\n.*?^(configs|dataset_info):.*?^---$", re.DOTALL | re.MULTILINE)
FILE_URL = re.compile(rf"{PREFIX}(?P<name>[^/]+/[^@/]+)@(?P<revision>[^/]+)/(?P<file>.+)")
T = TypeVar("T")


def find_files(settings: SourceSettings) -> tuple[list[File], list[Chosen]]:
    """The files of a source, and what was selected in their folders.

    Raises `UserError` if there are none, and `NetworkError`.
    """
    folder, name = Path(settings.path), hub_data_set(settings.path)
    if folder.is_dir() and _is_laid_out_like_the_hub(folder, settings):
        return _hub_files(settings.path, settings), []
    if name:
        return _hub_files(name, settings), []
    if "://" in settings.path:
        return _files_at_url(settings.path, settings.split)
    found = find(folder, KINDS, settings.split)
    return [local_file(path) for path in found.paths], [found]


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a data set of the hub."""
    return "://" in path or hub_data_set(path) is not None


def _files_at_url(url: str, split: str) -> tuple[list[File], list[Chosen]]:
    """The file at a URL, or those of a folder, selected as by `choose`.

    Raises `UserError` if nothing there can be read, and `NetworkError`.
    """
    if kind_of(_without_query(url)) in KINDS:
        return [remote_file(url)], []
    system, path = _file_system(url)
    with network(url):
        inside = {name.removeprefix(path).lstrip("/"): name for name in system.find(path)}
    if not inside:
        raise UserError(f"{url}: no {listed(KINDS)} file there (all but .parquet and .arrow also as .gz or .zst)")
    chosen = choose(url, inside, KINDS, split)
    return [remote_file(system.unstrip_protocol(inside[name])) for name in chosen.names], [chosen]


def remote_file(url: str) -> File:
    """The file at a URL, and its description: its size, and its version as far as the server tells it."""
    system, path = _file_system(url)

    def opened() -> io.BufferedReader:
        with network(url):
            stream = system.open(path, "rb", block_size=BLOCK)
        return io.BufferedReader(_Stream(stream, url), PIECE)

    def described() -> dict[str, Any]:
        with network(url):
            info = system.info(path)
        version = (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("ETag") or info.get("etag")
        return {"path": url, "bytes": info.get("size"), "version": version}

    return File(_without_query(url), opened, described)


def _without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith("http") else url


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        import fsspec

        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)
            options = {"client_kwargs": {"timeout": timeout}}
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))
    except ImportError as error:
        known = "fsspec and aiohttp come with pip install slmkit[hub]"
        raise UserError(f"{url}: {protocol}:// needs one more package: {error}; {known}") from None
    except ValueError:
        raise UserError(f"{url}: unknown kind of URL {protocol}://") from None


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

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        with network(self.url):
            data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        if not data and len(buffer) and self.size is not None and self.place < self.size:
            raise NetworkError(f"{self.url}: the connection broke: {self.place:,} of {self.size:,} bytes came")
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:  # `UserError` if the size is unknown
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence, self.size)
        if base is None:
            raise UserError(f"{self.url}: the server does not tell the size of the file; download it first")
        with network(self.url):
            try:
                self.stream.seek(base + offset)
                self.place = base + offset
            except ValueError:  # the server does not support byte ranges
                if base + offset < self.place:
                    raise
                while self.place < base + offset and self.readinto(bytearray(min(BLOCK, base + offset - self.place))):
                    pass
        return self.place

    def close(self) -> None:
        self.stream.close()
        super().close()


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


def hub_data_set(path: str) -> str | None:
    """`owner/name` if the path is a hub data set; None for a file or folder, or something inside a data set."""
    name = path.removeprefix(PREFIX).rstrip("/")
    is_local = path == name and (Path(path).exists() or kind_of(path) in KINDS)  # or a missing local file
    return name if NAME.fullmatch(name) and not is_local else None


def _is_laid_out_like_the_hub(folder: Path, settings: SourceSettings) -> bool:
    """Whether a folder has configurations: set by the user, or in its README."""
    readme = folder / "README.md"
    if settings.config or not readme.is_file():
        return bool(settings.config)
    return bool(FRONT_MATTER.search(readme.read_text(encoding="utf-8", errors="replace")))


def _hub_files(path: str, settings: SourceSettings) -> list[File]:
    """The files of a split of a data set `owner/name`, or of a folder.

    Raises `UserError` for an unknown configuration or split, with the known ones, and `NetworkError`.
    """
    datasets = _datasets()
    what, is_local = f"data set {path}", Path(path).is_dir()
    with network(what):
        try:
            builder = datasets.load_dataset_builder(path, name=settings.config, revision=settings.revision)
        except datasets.exceptions.DataFilesNotFoundError:
            raise UserError(f"{what}: holds no data files of a known kind") from None
        except Exception as error:
            # A wrong configuration, or a loading script.
            if str(error).startswith(("BuilderConfig", "Config name", "Dataset scripts")):
                hint = " (config)" if "onfig" in str(error) else ""
                raise UserError(f"{what}: {one_line(error)}{hint}") from None
            if is_local:  # nothing is read over a network, so trying again does not help
                raise UserError(f"{what}: its README.md or files are not as expected: {one_line(error)}") from None
            raise
    splits = builder.config.data_files or {}
    if settings.split not in splits:
        raise UserError(f"{what}: no split {settings.split!r}; {did_you_mean(settings.split, map(str, splits))}")
    urls = [*map(str, splits[settings.split])]
    if unknown := next((url for url in urls if kind_of(url) not in KINDS), None):
        raise UserError(f"{settings.path}: {Path(unknown).name}: expected {listed(KINDS)} (also as .gz or .zst)")
    open_as = local_file if is_local else remote_file if settings.streaming else _downloaded_file
    return [*map(open_as, urls)]


def _downloaded_file(url: str) -> File:
    """A file that is downloaded to the hub's cache when first opened, resuming a partial download."""

    def opened() -> io.BufferedReader:
        from huggingface_hub import hf_hub_download

        found = FILE_URL.fullmatch(url)
        assert found, url
        with network(url):
            path = hf_hub_download(found["name"], found["file"], repo_type="dataset", revision=found["revision"])
        return Path(path).open("rb")

    return File(url, opened, lambda: remote_file(url).describe())


def _datasets() -> Any:
    with importing("data sets of the hub need one more package: pip install slmkit[hub]"):
        import datasets
        import datasets.exceptions
        from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # its retries are not shown; a final failure is one line of ours
    return datasets
