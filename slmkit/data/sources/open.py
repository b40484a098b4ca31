"""From what a recipe says to a source that can be read."""

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
    """Find what `settings` name; `seed` and `held_out` are for what is built in: which of it, and of what split.

    Raises `UserError` where there is nothing to read, with what was looked for.
    """
    patience = patience or RetryPolicy(settings.retry_for)
    if settings.path in BUILT_IN:
        if settings.mapping or settings.row_format or settings.separator:
            raise UserError(f"{settings.path} is built in and has no columns: remove columns, row_format and separator")
        return Source(settings, [StoryPart(settings.path, seed, held_out)], patience)
    files, found = patience.until_done(lambda: _files(settings, KINDS))
    return Source(settings, [FilePart(file, settings) for file in files], patience, found)


def expect_source(settings: SourceSettings) -> None:
    """Raises `UserError` for a file or folder that is not there. Nothing is read, and no network is asked."""
    path = settings.path
    if path not in BUILT_IN and not hub_name(path) and not is_url(path) and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")


def read_documents(paths: Paths, text_column: str | None = None) -> Iterator[Document]:
    """Every document in files and folders (sorted, with their subfolders), in order. Blank ones are left out.

    Texts longer than `PIECE` characters come in pieces, cut at line ends where there are some. Raises `UserError` for
    whatever cannot be read as text, as it is reached, and when there is no document at all.
    """
    source = _local_source(find(paths), text_column=text_column)
    return (document for document, _ in source.read())


def read_conversations(paths: Paths, messages_column: str | None = None) -> Iterator[list[Message]]:
    """Every conversation in JSON lines and parquet files and folders of them: lists of messages, as given.

    Raises `UserError` as `read_documents` does, and for a row that is not a list of objects.
    """
    source = _local_source(find(paths, ROW_KINDS), messages_column=messages_column)
    return (conversation for conversation, _ in source.read_conversations())


def _files(settings: SourceSettings, kinds: Sequence[str]) -> tuple[list[File], list[Chosen]]:
    """The files, and what was chosen of the folder that they are in."""
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
