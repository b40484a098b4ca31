"""Shards with any content, and borders anywhere, also within a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slmkit.data.shards.reader import TokenShards
from slmkit.data.shards.writer import write_shards


def written(
    directory: Path,
    tokenizer: Any,
    ids: np.ndarray,
    ends: np.ndarray,
    trained: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    *,
    text_bytes: int | None = None,
    shard_tokens: int = 1 << 28,
    **options: Any,
) -> TokenShards:
    """Write tokens [n] of documents that end at `ends` [documents], `shard_tokens` in each shard."""

    def parts() -> Iterator[tuple[dict[str, np.ndarray], int]]:
        size = len(ids) if text_bytes is None else text_bytes
        for start in range(0, len(ids), shard_tokens):
            stop = min(start + shard_tokens, len(ids))
            here = (ends > start) & (ends <= stop)
            arrays = {"tokens": ids[start:stop], "ends": ends[here] - start}
            if trained is not None:
                arrays["trained"] = trained[start:stop]
            if labels is not None:
                arrays["labels"] = labels[here]
            yield arrays, size if start == 0 else 0

    return write_shards(directory, tokenizer, parts(), **options)
