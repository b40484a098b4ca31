"""From what a recipe says to a source that can be read."""

from __future__ import annotations

from collections.abc import Iterator

from slmkit.data.source_settings import SourceSettings
from slmkit.data.sources.documents import Document, Message
from slmkit.data.sources.files import CONVERSATION_KINDS, Paths, find_files, local_file
from slmkit.data.sources.parts import PRIMER, STORIES, FilePart, StoryPart
from slmkit.data.sources.source import Source


def open_source(settings: SourceSettings, seed: int = 0) -> Source:
    """Find what `settings` name; `seed` is that of the built-in corpus.

    Raises `UserError` where there is nothing to read, with what was looked for.
    """
    if settings.path in (STORIES, PRIMER):
        return Source(settings, [StoryPart(settings.path, seed)])
    return Source(settings, [FilePart(local_file(path), settings) for path in find_files(settings.path)])


def read_documents(paths: Paths, text_column: str = "text") -> Iterator[Document]:
    """Every document in files and folders (sorted, with their subfolders), in order. Blank ones are left out.

    Texts longer than `PIECE` characters come in pieces, cut at line ends where there are some. Raises `UserError` for
    whatever cannot be read as text, as it is reached, and when there is no document at all.
    """
    files = find_files(paths)
    settings = SourceSettings(path=str(files[0]), text_column=text_column)
    source = Source(settings, [FilePart(local_file(path), settings) for path in files])
    return (document for document, _ in source.read())


def read_conversations(paths: Paths, messages_column: str = "messages") -> Iterator[list[Message]]:
    """Every conversation in JSON lines and parquet files and folders of them: lists of messages, as given.

    Raises `UserError` as `read_documents` does, and for a row that is not a list of objects.
    """
    files = find_files(paths, CONVERSATION_KINDS)
    settings = SourceSettings(path=str(files[0]), messages_column=messages_column)
    source = Source(settings, [FilePart(local_file(path), settings) for path in files])
    return (conversation for conversation, _ in source.read_conversations())
