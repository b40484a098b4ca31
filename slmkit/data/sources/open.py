"""Opens the source that settings describe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from slmkit.config import UserError
from slmkit.data.sources.built_in import BUILT_IN
from slmkit.data.sources.documents import Document, Message
from slmkit.data.sources.files import KINDS, ROW_KINDS, File, Paths, local_file
from slmkit.data.sources.folders import Chosen, find
from slmkit.data.sources.hub import hub_files, hub_name, is_laid_out_like_the_hub
from slmkit.data.sources.parts import FilePart, StoryPart
from slmkit.data.sources.remote import RetryPolicy, find_remote, is_url
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.sources.source import Source


def open_source(
    settings: SourceSettings, seed: int = 0, patience: RetryPolicy | None = None, held_out: bool = False
) -> Source:
    """The source for `settings`; `seed` and `held_out` select the stream of a built-in source.

    Raises `UserError` if there is nothing to read, with what was looked for.
    """
    patience = patience or RetryPolicy(settings.retry_for)
    if settings.path in BUILT_IN:
        if settings.mapping or settings.row_format or settings.separator:
            raise UserError(f"{settings.path} is built in and has no columns: remove columns, row_format and separator")
        return Source(settings, [StoryPart(settings.path, seed, held_out)], patience)
    files, found = patience.until_done(lambda: _files(settings, KINDS))
    return Source(settings, [FilePart(file, settings) for file in files], patience, found)


def expect_source(settings: SourceSettings) -> None:
    """Raises `UserError` if a local file or folder does not exist. Reads nothing and uses no network."""
    path = settings.path
    if path not in BUILT_IN and not hub_name(path) and not is_url(path) and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")


def read_documents(paths: Paths, text_column: str | None = None) -> Iterator[Document]:
    """All documents in files and folders (sorted, with subfolders), in order, without blank ones.

    Texts longer than `PIECE` characters come in pieces, cut at line ends if possible. Raises `UserError` for unreadable
    text when it is reached, and if there is no document.
    """
    source = _local_source(find(paths), text_column=text_column)
    return (document for document, _ in source.read())


def read_conversations(paths: Paths, messages_column: str | None = None) -> Iterator[list[Message]]:
    """All conversations in JSON lines and parquet files and folders of them, as lists of messages.

    Raises `UserError` as `read_documents` does, and for a row that is not a list of objects.
    """
    source = _local_source(find(paths, ROW_KINDS), messages_column=messages_column)
    return (conversation for conversation, _ in source.read_conversations())


def _files(settings: SourceSettings, kinds: Sequence[str]) -> tuple[list[File], list[Chosen]]:
    """The files, and what was selected in their folders. Raises `UserError` if there are none."""
    folder = Path(settings.path)
    if folder.is_dir() and is_laid_out_like_the_hub(folder, settings):
        return hub_files(settings.path, settings, kinds), []
    if name := hub_name(settings.path):
        return hub_files(name, settings, kinds), []
    if is_url(settings.path):
        return find_remote(settings.path, kinds, settings.split)
    found = find(settings.path, kinds, settings.split)
    return _local_files(found), found


def _local_files(found: Sequence[Chosen]) -> list[File]:
    return [local_file(Path(one.folder, name)) for one in found for name in one.names]


def _local_source(found: list[Chosen], **columns: str | None) -> Source:
    files = _local_files(found)
    settings = SourceSettings(path=files[0].name, **columns)
    return Source(settings, [FilePart(file, settings) for file in files], RetryPolicy(settings.retry_for), found)
