"""A list of texts as a data set, for `SLMTrainer` or a Hugging Face trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slmkit.config import UserError, arguments_checked, kind_of_value
from slmkit.data.packing import IGNORED, padded
from slmkit.data.shards.work import beginning_of
from slmkit.data.stream import Rows


class AnyTokenizer(Protocol):
    """The interface required of a tokenizer; `eos_token_id` and `pad_token_id` are used if present."""

    def encode(self, text: str, /) -> list[int]: ...  # [tokens]

    def __len__(self) -> int: ...


class TextDataset(Dataset, Rows):
    """Windows of `max_length` tokens over each text, one every `stride` tokens (default: `max_length`).

    The tokenizer's own beginning precedes each text, as in shards, and an end-of-text token follows; windows are
    right-padded. An item is what a Hugging Face model takes: `input_ids` and `labels`, int64 [max_length]. Labels equal
    the ids (the model shifts them), except for -100 on padding and on positions learned in the window before. Such a
    model never learns the first token of a window, so only a stride below `max_length` teaches all of a long text.

    `rows_in_epoch` and `row(i)` give the same texts to `Stream`, with labels already shifted: each token but a text's
    first is a label exactly once, for any stride.
    """

    @arguments_checked
    def __init__(
        self, texts: Sequence[str], tokenizer: AnyTokenizer, max_length: int, stride: int | None = None
    ) -> None:
        """Raises `UserError` for invalid lengths, for one string instead of a list, and if no text has two tokens."""
        if isinstance(texts, str):
            raise UserError('TextDataset: expected a list of texts, found one string: write TextDataset(["…"], …)')
        if isinstance(texts, Mapping) or hasattr(texts, "encode"):
            raise UserError(f"TextDataset: expected a list of texts, found {type(texts).__name__}")
        if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
            raise UserError("TextDataset: expected a tokenizer after the texts: SLMTokenizer.from_pretrained(…)")
        for name, length in (("max_length", max_length), ("stride", stride)):
            if length is not None and not isinstance(length, int | np.integer):
                raise UserError(f"TextDataset: {name} {length!r}: expected a whole number")
        self.length, self.stride = max_length, max_length if stride is None else stride
        if max_length < 2:
            raise UserError(f"expected a max_length of at least 2 tokens, found {max_length}")
        if not 1 <= self.stride <= max_length:
            raise UserError(
                f"expected a stride from 1 to max_length ({max_length}), found {stride}: text would be left out"
            )
        eos_id = getattr(tokenizer, "eos_token_id", None)
        pad_id = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = 0 if pad_id is None else int(pad_id)
        end = [] if eos_id is None else [int(eos_id)]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"TextDataset: text {number} is {kind_of_value(text)}; expected text")
        start = beginning_of(tokenizer)
        self._texts = [np.array([*start, *tokenizer.encode(text), *end], dtype=np.int64) for text in texts if text]
        self._items = self._windows(0)
        self._rows = self._windows(1)  # the last token of a text has no label, so it is no input
        if not self._rows:
            raise UserError(f"none of {len(texts)} texts has two tokens, so there is nothing to learn")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text, start = self._items[index]
        tokens = self._texts[text][start : start + self.length]
        ids, labels = self._padded(tokens, tokens, start)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    @property
    def rows_in_epoch(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and next-token labels, int64 [max_length] each, for `Stream`."""
        text, start = self._rows[index]
        tokens = self._texts[text][start : start + self.length + 1]
        return self._padded(tokens[:-1], tokens[1:], start)

    def _windows(self, reserved: int) -> list[tuple[int, int]]:
        """(text, start) of the windows that together cover all but the last `reserved` tokens of each text."""
        windows = []
        for text, tokens in enumerate(self._texts):
            length = len(tokens) - reserved
            if length < 1:
                continue
            beyond_first = max(0, length - self.length)
            count = 1 + -(-beyond_first // self.stride)
            windows += [(text, number * self.stride) for number in range(count)]
        return windows

    def _padded(self, ids: np.ndarray, labels: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        labels = labels.copy()
        if start > 0:
            labels[: self.length - self.stride] = IGNORED
        return padded([ids], self.length, self.pad_id), padded([labels], self.length, IGNORED)
