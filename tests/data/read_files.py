"""The documents or conversations of a file or folder, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmkit.data.sources import Document, Message, open_source
from slmkit.data.sources.settings import SourceSettings


def read_documents(path: str | Path, **settings: Any) -> Iterator[Document]:
    return (document for document, _ in open_source(SourceSettings(path=str(path), **settings)).read())


def read_conversations(path: str | Path) -> Iterator[list[Message]]:
    return (conversation for conversation, _ in open_source(SourceSettings(path=str(path))).read(kind="conversations"))
