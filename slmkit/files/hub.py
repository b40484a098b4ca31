"""Reads models from the Hugging Face hub through `huggingface_hub` and its cache, and publishes them there.

Respects `huggingface_hub`'s environment variables: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmkit.config import UserError, importing, one_line

NAME = re.compile(r"(hf:/{1,2})?(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)")
SMALL = ["*.json", "*.jinja"]  # configs and tokenizers
WEIGHTS = "*.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Hub repositories with the weights of presets; a preset itself has only shapes.
PUBLISHED = {
    "gpt2": "openai-community/gpt2",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "gemma-3-270m": "google/gemma-3-270m",
}


@dataclass(frozen=True)
class HubName:
    """`OWNER/NAME` and a branch, tag or commit; a `revision` of None is the main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def hub_name(path: str | Path) -> HubName | None:
    """The hub name in `OWNER/NAME`, `OWNER/NAME@REVISION` or `hf://OWNER/NAME`; None for a local path.

    An existing local file or directory takes precedence. A name inside a local folder, such as `runs/x`, is local even
    if it does not exist. `hf://` always means the hub.
    """
    found = NAME.fullmatch(str(path))
    if found is None or found["name"].startswith("."):
        return None
    if found[1] is None and (Path(path).exists() or Path(path).parent.is_dir()):
        return None
    return HubName(found["name"], found["revision"])


def hub_directory(wanted: HubName, weights: bool = True) -> Path:
    """The model's directory in the hub's cache, named by its resolved commit; missing files are downloaded.

    Without `weights`, only JSON files. Raises `UserError` if the download fails or there are no safetensors weights.
    """
    hub = _client()
    patterns = [*SMALL, WEIGHTS] if weights else SMALL
    with _explained(wanted):
        found = hub.snapshot_download(
            wanted.name, revision=wanted.revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    directory = Path(found)
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer.json")):
        raise UserError(f"{wanted}: no model: it has no config.json at its top (a cached copy may be incomplete)")
    if weights:
        _check_weights(wanted, directory)
    return directory


def at_commit(path: str) -> str:
    """A hub name pinned to its current commit; any other path unchanged. Raises `UserError` as `hub_directory`."""
    wanted = hub_name(path)
    return path if wanted is None else f"hf://{wanted.name}@{hub_directory(wanted, weights=False).name}"


def pinned_name(directory: Path) -> str:
    """The pinned hub name of a directory in the hub's cache; the absolute path of any other directory."""
    found = CACHED.search(directory.as_posix())
    return f"hf://{found['owner']}/{found['name']}@{found['commit']}" if found else str(directory.resolve())


def publish(wanted: HubName, files: Mapping[str, Path | bytes], private: bool, message: str) -> str:
    """Upload `files` (name in the repository → content) in one commit and return the URL of the model's page.

    Creates the repository and the branch if they do not exist. Raises `UserError` if the upload fails.
    """
    hub = _client()
    operations = [
        hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    with _explained(wanted):
        api = hub.HfApi()
        page = api.create_repo(wanted.name, private=private or None, exist_ok=True)
        if wanted.revision is not None:
            api.create_branch(wanted.name, branch=wanted.revision, exist_ok=True)
        api.create_commit(wanted.name, operations, commit_message=message, revision=wanted.revision)
    return str(page)


@contextlib.contextmanager
def _explained(wanted: HubName) -> Iterator[None]:
    """Context that turns errors of the hub or the network into a one-line `UserError` with advice."""
    try:
        with network(str(wanted)):
            yield
    except NetworkError as error:
        hint = _nearest(wanted.name) if "not found (404)" in str(error) or "(401)" in str(error) else ""
        raise UserError(f"{error}{hint}{'' if error.lasting else '; try again'}") from None


def _nearest(name: str) -> str:
    """A hint with similar names of common models; empty if none is similar."""
    known: dict[str, str] = {}
    for preset, published in PUBLISHED.items():
        known |= dict.fromkeys((preset, published.lower(), published.lower().partition("/")[2]), published)
    tried = (name.lower(), name.lower().partition("/")[2])
    near = next(filter(None, (difflib.get_close_matches(one, known, 1, 0.8) for one in tried)), [])
    meant = known[near[0]] if near else ""
    return f"; did you mean {meant!r}?" if meant and meant != name else ""


def _check_weights(wanted: HubName, directory: Path) -> None:
    """Raises `UserError` if weights are pickles, missing or truncated."""
    import safetensors  # a late import, since most commands download nothing

    files = sorted(directory.glob(WEIGHTS))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        with contextlib.suppress(ValueError, KeyError, AttributeError):  # loading reports these in more detail
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if missing := shards - {path.name for path in files}:
                raise UserError(f"{wanted}: {sorted(missing)[0]} is missing, which its index of weights names")
    if not files:
        pickles: list[str] = []
        with contextlib.suppress(Exception):  # offline
            names = _client().HfApi().list_repo_files(wanted.name, revision=directory.name)
            pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise UserError(
                f"{wanted}: its weights are pickles ({pickles[0]}), which can run code and are never read; look on "
                "its page for a revision with safetensors, and name that: OWNER/NAME@REVISION"
            )
        raise UserError(f"{wanted}: it has no weights in safetensors at its top, the only kind that is read")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{wanted}: {path.name} is damaged or cut short in the cache ({error}): delete {path.resolve()} and "
                "run this again"
            ) from None


def _client() -> Any:
    with importing("models of the hub need one more package: pip install slmkit[hub]"):
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    return huggingface_hub


LOGIN = "log in with `hf auth login` or set HF_TOKEN"
ABSENT = "not found (404): misspelt, renamed or private; check the name"
# HTTP status → meaning, and whether the failure is permanent (retrying does not help).
STATUS = {
    401: (f"not allowed without an account that has access (401): {LOGIN}", True),
    403: (f"not allowed (403): ask for access on its page, then {LOGIN}", True),
    404: (ABSENT, True),
    410: ("gone (410): check the name", True),
    429: ("too many requests (429)", False),
}
# Permanent failures, by class names of several libraries, some of which may not be installed; the first row that fits
# an error or one of its causes applies. An empty meaning is the error's own text.
PERMANENT = {
    ("IncompleteSnapshotError",): "its cached copy is incomplete, and the hub cannot be reached: try again online",
    ("GatedRepoError",): f"gated; accept its terms on its page on the hub, then {LOGIN}",
    ("DisabledRepoError",): "its owner or the hub has disabled it",
    ("RevisionNotFoundError",): "no such branch, tag or commit",
    ("DatasetNotFoundError", "RepositoryNotFoundError", "EntryNotFoundError"): f"{ABSENT}, or {LOGIN} if it is private",
    ("HFValidationError", "LocalTokenNotFoundError"): "",
}
OFFLINE = (
    "OfflineModeIsEnabled", "ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectionError",
    "ConnectionRefusedError", "gaierror",
)  # fmt: skip
SLOW = {"TimeoutException", "TimeoutError", "ServerTimeoutError", "FSTimeoutError"}


class NetworkError(Exception):
    """A network or server failure. `lasting`: retrying does not help, the user has to act.

    `retry_after`: seconds, from the server's Retry-After header; 0 if absent.
    """

    def __init__(self, message: str, lasting: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.lasting, self.retry_after = lasting, retry_after


@contextlib.contextmanager
def network(what: str) -> Iterator[None]:
    """Context that turns any exception into a `NetworkError` whose message begins with `what`."""
    try:
        yield
    except (NetworkError, UserError, ImportError):
        raise
    except Exception as error:
        raise interruption(what, error) from error


def interruption(what: str, error: BaseException) -> NetworkError:
    """The `NetworkError` for `error`, from the first known exception in its chain of causes."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return NetworkError(f"{what}: cannot be stored here: {one_line(cause)}", lasting=True)
    for names, meaning in PERMANENT.items():
        for cause in causes:
            if not _kinds(cause).isdisjoint(names):
                return NetworkError(f"{what}: {meaning or one_line(cause)}", lasting=True)
    for cause in causes:
        if status := _status(cause):
            meaning, lasting = STATUS.get(status, (f"the server answers {status}", 400 <= status < 500))
            return NetworkError(f"{what}: {meaning}", lasting, _retry_after(cause))
    if any(_kinds(cause) & SLOW for cause in causes):
        return NetworkError(f"{what}: the server does not answer in time")
    if any(type(cause).__name__ in OFFLINE for cause in causes):  # not its subclasses, such as a connection reset
        return NetworkError(f"{what}: cannot be reached: this machine is offline, or told to be", lasting=True)
    if any(isinstance(cause, FileNotFoundError) for cause in causes):
        return NetworkError(f"{what}: {ABSENT}", lasting=True)
    return NetworkError(f"{what}: the connection broke: {type(error).__name__} {one_line(error)}".rstrip())


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and its chain of causes and contexts, newest first."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    # This one only says that the file is not cached; its cause says why the download failed.
    return [cause for cause in causes if type(cause).__name__ != "LocalEntryNotFoundError"] or causes


def _kinds(error: BaseException) -> set[str]:
    """The names of an error's classes."""
    gated = {"GatedRepoError"} if "is a gated dataset" in str(error) else set()  # `datasets` cuts the chain of causes
    return {kind.__name__ for kind in type(error).__mro__} | gated


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of `httpx`, `requests` or `aiohttp`."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) and status >= 400 else None


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0  # a date: use the default wait
