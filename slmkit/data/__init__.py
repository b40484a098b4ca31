"""From raw text to batches: sources, token shards, packing, and the stream that feeds the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slmkit.data.order import permuted
from slmkit.data.packing import IGNORED, Packing, pack_whole, windows
from slmkit.data.prepare import prepare_chat, prepare_text, split_conversations, split_validation
from slmkit.data.shard_writer import ShardWriter
from slmkit.data.shards import TokenShards
from slmkit.data.sources import Document, describe_sources, read_conversations, read_documents

if TYPE_CHECKING:
    from slmkit.data.batch import Batch
    from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, Stream
    from slmkit.data.text_dataset import TextDataset

# These need torch, which takes seconds to import: whoever asks for them waits, nobody else does.
_WITH_TORCH = {
    "Batch": "stream",
    "ChatRows": "stream",
    "DocumentRows": "stream",
    "PretrainRows": "stream",
    "Stream": "stream",
    "TextDataset": "text_dataset",
}

__all__ = [
    "IGNORED",
    "Batch",
    "ChatRows",
    "Document",
    "DocumentRows",
    "Packing",
    "PretrainRows",
    "ShardWriter",
    "Stream",
    "TextDataset",
    "TokenShards",
    "describe_sources",
    "pack_whole",
    "permuted",
    "prepare_chat",
    "prepare_text",
    "read_conversations",
    "read_documents",
    "split_conversations",
    "split_validation",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"slmkit.data.{_WITH_TORCH[name]}"), name)
