"""From raw text to batches: sources, token shards, packing, and the stream that feeds the model.

The names below are loaded when they are first used: settings are checked without what reads data, or torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmkit.data.batch import Batch
    from slmkit.data.order import permuted
    from slmkit.data.packing import IGNORED, Packing, pack_whole, windows
    from slmkit.data.prepare import prepare_chat, prepare_text, split_conversations, split_validation
    from slmkit.data.shard_writer import ShardWriter
    from slmkit.data.shards import TokenShards
    from slmkit.data.sources import Document, describe_sources, read_conversations, read_documents
    from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, Stream
    from slmkit.data.text_dataset import TextDataset

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

_HOME = {
    "Batch": "batch",
    "ChatRows": "stream",
    "Document": "sources",
    "DocumentRows": "stream",
    "IGNORED": "packing",
    "Packing": "packing",
    "PretrainRows": "stream",
    "ShardWriter": "shard_writer",
    "Stream": "stream",
    "TextDataset": "text_dataset",
    "TokenShards": "shards",
    "describe_sources": "sources",
    "pack_whole": "packing",
    "permuted": "order",
    "prepare_chat": "prepare",
    "prepare_text": "prepare",
    "read_conversations": "sources",
    "read_documents": "sources",
    "split_conversations": "prepare",
    "split_validation": "prepare",
    "windows": "packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"slmkit.data.{_HOME[name]}"), name)
