"""The data sets of scripts: a list of texts, and any torch data set of token ids, as rows and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slmkit.config import UserError, arguments_checked, kind_of_value
from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED, padded
from slmkit.data.shards.folder import beginning_of
from slmkit.data.sources.turns import WEIGHTS, is_on_learning
from slmkit.data.stream import Batches, Rows, share_of_rank


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


# -- any torch data set ------------------------------------------------------------------------------------------------

KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
Tokens = tuple[np.ndarray, np.ndarray]  # ids and next-token labels, int64 [tokens] each


@dataclass(frozen=True)
class ItemFormat:
    """How to convert an item to a row: maximum length in tokens, padding id, the model's vocabulary size.

    `name` is what error messages call the data set.
    """

    length: int
    pad_id: int
    vocab_size: int
    name: str = "the data set"

    def row(self, item: Any, index: int) -> Tokens:
        """Ids and next-token labels, int64 [tokens] each, of an item.

        `input_ids` [tokens] is a list, array or tensor. Optional: `labels` of the same positions (-100: not learned;
        default: all are) and an `attention_mask` whose zeros at either end are padding. Raises `UserError` that names
        the item.
        """
        where = f"item {index:,} of {self.name}"
        if not isinstance(item, Mapping) or "input_ids" not in item:
            found = ", ".join(map(str, item)) if isinstance(item, Mapping) else kind_of_value(item)
            raise UserError(f"{where}: expected a dict with input_ids (and labels), found {found}")
        ids, labels = (np.asarray(item.get(name, item["input_ids"])) for name in ("input_ids", "labels"))
        mask = np.asarray(item.get("attention_mask", np.ones(ids.shape[:1])))
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.shape == labels.shape == mask.shape:
            raise UserError(
                f"{where}: expected one row of whole numbers each, of one length; found input_ids {ids.dtype} "
                f"{list(ids.shape)}, labels {list(labels.shape)}, attention_mask {list(mask.shape)}"
            )
        for name, value in item.items():
            if name not in KEYS and np.shape(value)[:1] == ids.shape:
                raise UserError(
                    f"{where}: {name!r} has one value per token and is not used; put -100 into labels, or remove it"
                )
            if (name in WEIGHTS and np.any(np.asarray(value) != 1)) or (
                name not in KEYS and is_on_learning(str(name), value)
            ):
                raise UserError(
                    f"{where}: {name!r} is not read: put -100 into labels for what is not learned, and remove it"
                )
        real = np.flatnonzero(mask)
        kept = slice(real[0], real[-1] + 1) if len(real) else slice(0)
        ids, labels = ids[kept].astype(np.int64), labels[kept].astype(np.int64)
        if len(ids) != len(real):
            raise UserError(f"{where}: its attention_mask has zeros between ones, which training does not support")
        if len(ids) > self.length + 1:
            raise UserError(
                f"{where}: {len(ids):,} tokens are longer than {self.length:,}: cut it, or raise sequence_length or "
                "max_position_embeddings in the config"
            )
        for name, values in (("token", ids), ("label", labels[labels != IGNORED])):
            if len(values) and not 0 <= values.min() <= values.max() < self.vocab_size:
                wrong = values[(values < 0) | (values >= self.vocab_size)][0]
                raise UserError(f"{where}: {name} {wrong} is not among the model's {self.vocab_size:,}")
        return ids[:-1], labels[1:]

    def stacked(self, rows: list[Tokens]) -> Tokens:
        """Ids and labels, int64 [rows, longest] each, right-padded."""
        longest = max(1, *(len(ids) for ids, _ in rows))
        ids = np.stack([padded([ids], longest, self.pad_id) for ids, _ in rows])
        return ids, np.stack([padded([labels], longest, IGNORED) for _, labels in rows])


class DatasetRows(Rows):
    """A map-style data set (`len` and `[index]`); rows read together are padded to the longest of them."""

    def __init__(self, dataset: Any, form: ItemFormat) -> None:
        """Raises `UserError` if it is empty."""
        self.dataset, self.form = dataset, form
        if not len(dataset):
            raise UserError(f"{form.name} has no items: at least one is needed")

    @property
    def rows_in_epoch(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> Tokens:  # int64 [tokens] each
        return self.form.row(self.dataset[index], index)

    def rows(self, indices: list[int]) -> Tokens:  # int64 [rows, longest] each
        return self.form.stacked([self.row(index) for index in indices])


class IterableBatches(Batches):
    """An iterable data set in its own order, repeated when it ends.

    To continue at a step, the items before it are read again, so iterations must give the same items each time. Raises
    `UserError` if it gives no items.
    """

    def __init__(self, dataset: Any, form: ItemFormat, rows_per_step: int) -> None:
        self.dataset, self.form, self.rows_per_step = dataset, form, rows_per_step
        self.seek(0, {})

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:  # ids and labels [rows, longest]
        if step != self._step:
            self.seek(step, {})
        items = [next(self._items) for _ in range(self.rows_per_step)]
        self._step += 1
        chosen = range(self.rows_per_step)[share_of_rank(self.rows_per_step, rank, world)]
        first = step * self.rows_per_step
        return Batch.of(*self.form.stacked([self.form.row(items[place], first + place) for place in chosen]))

    def seek(self, step: int, position: dict[str, Any]) -> None:
        self._step, self._items = step, self._repeated()
        for _ in range(step * self.rows_per_step):
            next(self._items)

    def _repeated(self) -> Iterator[Any]:
        while True:
            item = None
            for item in self.dataset:
                yield item
            if item is None:
                raise UserError("the data set gave no items: it is empty, or it can be read only once")
