"""What the libraries raise when the network fails, as one clear line each."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from slmkit.config import UserError

LOGIN = "log in with `hf auth login` or set HF_TOKEN"
# What an HTTP status means, and whether it lasts until somebody does something about it.
STATUS = {
    401: (f"not allowed without an account that has access (401): {LOGIN}", True),
    403: (f"not allowed (403): ask for access on its page, then {LOGIN}", True),
    404: ("not found (404): misspelt, renamed or private; check the name", True),
    410: ("gone (410): check the name", True),
    429: ("too many requests (429)", False),
}
# Names of classes of several libraries, of which not all are installed.
GATED, ABSENT = ("GatedRepoError",), ("DatasetNotFoundError", "RepositoryNotFoundError", "EntryNotFoundError")
OFFLINE = (
    "OfflineModeIsEnabled", "ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionError",
    "ConnectionRefusedError", "gaierror",
)  # fmt: skip
SLOW = ("TimeoutException", "TimeoutError", "ServerTimeoutError", "FSTimeoutError")


class NetworkError(Exception):
    """The network, or what is behind it, failed. Without any read before it, a `lasting` failure is the user's to mend.

    `retry_after`: the seconds that the server asks for.
    """

    def __init__(self, message: str, lasting: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.lasting, self.retry_after = lasting, retry_after


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def network(what: str) -> Iterator[None]:
    """Whatever fails inside is the network's failure: raises `NetworkError` with a line that begins with `what`."""
    try:
        yield
    except (NetworkError, UserError, ImportError):
        raise
    except Exception as error:
        raise interruption(what, error) from error


def interruption(what: str, error: BaseException) -> NetworkError:
    """The line for `error`, by the first thing in the chain of its causes that is known here."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return NetworkError(f"{what}: cannot be stored here: {one_line(cause)}", lasting=True)
    for cause in causes:
        if _is(cause, GATED) or "is a gated dataset" in str(cause):  # `datasets` cuts the chain of causes
            return NetworkError(f"{what}: gated; accept its terms on its page on the hub, then {LOGIN}", lasting=True)
        if _is(cause, ("DisabledRepoError",)):
            return NetworkError(f"{what}: its owner or the hub has disabled it", lasting=True)
        if _is(cause, ABSENT):
            return NetworkError(f"{what}: {STATUS[404][0]}, or {LOGIN} if it is private", lasting=True)
        status = _status(cause)
        if status is not None:
            meaning, lasting = STATUS.get(status, (f"the server answers {status}", 400 <= status < 500))
            return NetworkError(f"{what}: {meaning}", lasting, _retry_after(cause))
    for cause in causes:
        if _is(cause, SLOW):
            return NetworkError(f"{what}: the server does not answer in time")
    for cause in causes:
        if type(cause).__name__ in OFFLINE:  # and not what is derived from it, such as a connection that was reset
            return NetworkError(f"{what}: cannot be reached: this machine is offline, or told to be", lasting=True)
    if any(isinstance(cause, FileNotFoundError) for cause in causes):
        return NetworkError(f"{what}: {STATUS[404][0]}", lasting=True)
    return NetworkError(f"{what}: the connection broke: {type(error).__name__} {one_line(error)}".rstrip())


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error, and what it was raised from or while handling; the first is the last that happened."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    # Says no more than that the file is not here, and is raised from the reason why it could not be brought.
    return [cause for cause in causes if not _is(cause, ("LocalEntryNotFoundError",))] or causes


def _is(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of `httpx`, `requests` or `aiohttp`."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) and status >= 400 else None


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0  # a date: the ordinary wait will do
