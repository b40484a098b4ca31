"""From what a recipe says to a source that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources.built_in import BUILT_IN
from slmkit.data.sources.documents import Document, Message
from slmkit.data.sources.files import CONVERSATION_KINDS, KINDS, File, Paths, find_files, local_file
from slmkit.data.sources.hub import hub_files, hub_name, is_laid_out_like_the_hub
from slmkit.data.sources.parts import FilePart, StoryPart
from slmkit.data.sources.patience import Patience
from slmkit.data.sources.remote import find_remote, is_url
from slmkit.data.sources.source import Source


def open_source(
    settings: SourceSettings, seed: int = 0, patience: Patience | None = None, held_out: bool = False
) -> Source:
    """Find what `settings` name; `seed` and `held_out` are for what is built in: which of it, and of what split.

    Raises `UserError` where there is nothing to read, with what was looked for.
    """
    patience = patience or Patience(settings.retry_for)
    if settings.path in BUILT_IN:
        return Source(settings, [StoryPart(settings.path, seed, held_out)], patience)
    files = patience.until_done(lambda: _files(settings, KINDS))
    return Source(settings, [FilePart(file, settings) for file in files], patience)


def read_documents(paths: Paths, text_column: str = "text") -> Iterator[Document]:
    """Every document in files and folders (sorted, with their subfolders), in order. Blank ones are left out.

    Texts longer than `PIECE` characters come in pieces, cut at line ends where there are some. Raises `UserError` for
    whatever cannot be read as text, as it is reached, and when there is no document at all.
    """
    files = find_files(paths)
    source = _local_source(files, SourceSettings(path=str(files[0]), text_column=text_column))
    return (document for document, _ in source.read())


def read_conversations(paths: Paths, messages_column: str = "messages") -> Iterator[list[Message]]:
    """Every conversation in JSON lines and parquet files and folders of them: lists of messages, as given.

    Raises `UserError` as `read_documents` does, and for a row that is not a list of objects.
    """
    files = find_files(paths, CONVERSATION_KINDS)
    source = _local_source(files, SourceSettings(path=str(files[0]), messages_column=messages_column))
    return (conversation for conversation, _ in source.read_conversations())


def _files(settings: SourceSettings, kinds: Sequence[str]) -> list[File]:
    folder = Path(settings.path)
    if folder.is_dir() and is_laid_out_like_the_hub(folder, settings):
        return hub_files(settings.path, settings, kinds)
    if name := hub_name(settings.path):
        return hub_files(name, settings, kinds)
    if is_url(settings.path):
        return find_remote(settings.path, kinds)
    return [local_file(path) for path in find_files(settings.path, kinds)]


def _local_source(files: list[Path], settings: SourceSettings) -> Source:
    return Source(settings, [FilePart(local_file(path), settings) for path in files], Patience(settings.retry_for))
