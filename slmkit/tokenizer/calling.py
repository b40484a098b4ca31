"""The call interface of `transformers` tokenizers: `input_ids` and `attention_mask`, as lists or tensors."""

from __future__ import annotations

import difflib
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from slmkit.config import UserError, did_you_mean, methods_checked
from slmkit.tokenizer import chat
from slmkit.tokenizer.chat import Message, Tools

# transformers' names of the padding and truncation modes; pairs of texts are not supported.
PADDING = {"longest": True, "max_length": "max_length", "do_not_pad": False}
TRUNCATION = {"longest_first": True, "only_first": True, "do_not_truncate": False}
# Arguments of transformers' `apply_chat_template`: the supported ones, and those that are no switches of a template.
ARGUMENTS = ("add_generation_prompt", "tokenize", "tools", "return_tensors", "return_dict")
NO_SWITCHES = (
    "chat_template", "continue_final_message", "max_length", "padding", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "truncation",
)  # fmt: skip


class BatchEncoding(UserDict[str, Any]):
    """The result of a call: `input_ids` and `attention_mask` [texts, tokens], by key or attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> BatchEncoding:
        return BatchEncoding({name: value.to(device) for name, value in self.data.items()})


@methods_checked
class CallableTokenizer:
    """Methods of `transformers` tokenizers, implemented with those of `SLMTokenizer`."""

    padding_side: str = "right"
    model_max_length: int | None = None
    beginning: list[int]
    ending: list[int]
    special_tokens: dict[str, int]
    eos_token_id: int
    pad_token_id: int | None
    encode: Callable[..., list[int]]
    decode: Callable[..., str]
    encode_chat: Callable[..., chat.ChatTokens]
    _names: dict[str, str]
    _tokenizer: Tokenizer
    _template: Callable[[], str]

    def __call__(
        self,
        text: str | Iterable[str],
        *pair: Any,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Ids of one or several texts, including this tokenizer's beginning and ending tokens.

        Special tokens spelled in a text are recognised, as in `transformers`; for untrusted text use `encode`.
        `padding` ("longest", "max_length") is on `padding_side`, to a multiple of `pad_to_multiple_of`. `truncation`
        cuts to `max_length` (default: `model_max_length`, from the tokenizer's config) and keeps the ending tokens; a
        `max_length` without padding or truncation cuts too. `return_tensors="pt"` gives int64 [texts, longest]. Raises
        `UserError` for anything but texts, for pairs of texts, for padding without a padding token, and for tensors of
        texts of different lengths.
        """
        if pair:
            raise UserError("tokenizer(…): takes no pairs of texts: pass several texts as a list, options by name")
        is_several = isinstance(text, Iterable) and not isinstance(text, str | bytes | Mapping)
        texts: list[Any] = list(text) if is_several else [text]
        for one in texts:
            if not isinstance(one, str):
                raise UserError(f"tokenizer(…): expected a text or a list of texts, found {type(one).__name__} {one!r}")
        if truncation is None and not padding:
            truncation = max_length is not None
        truncation = _choice("truncation", truncation, TRUNCATION)
        before, behind = (self.beginning, self.ending) if add_special_tokens else ([], [])
        limit = (max_length or self.model_max_length) if truncation else None
        if not isinstance(limit, int | None):
            raise UserError(f"max_length {limit!r}: expected a whole number")
        room = None if limit is None else max(0, limit - len(before) - len(behind))
        rows = [[*before, *self.encode(one, allow_special=True)[:room], *behind] for one in texts]
        made = self.pad(rows, padding, max_length, pad_to_multiple_of, return_tensors)
        if isinstance(text, str) and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in made.items()})
        return made

    def pad(
        self,
        rows: Sequence[Any] | Mapping[str, Any],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad rows to a batch [rows, longest]; arguments and `UserError`s as for a call.

        A row is ids [tokens] or has `input_ids` and `attention_mask` [tokens]; several may be one mapping of lists.
        """
        if isinstance(rows, Mapping):
            rows = [dict(zip(rows, row)) for row in zip(*rows.values())]
        masks = [_mask_of(row) for row in rows]
        rows = [[*map(int, row["input_ids"] if isinstance(row, Mapping) else row)] for row in rows]
        padding, longest = _choice("padding", padding, PADDING), max(map(len, rows), default=0)
        length = (max_length or self.model_max_length) if padding == "max_length" else longest
        if not isinstance(length, int):
            raise UserError(f"max_length {length!r}: padding='max_length' needs it as a whole number")
        length += -length % (pad_to_multiple_of or 1)
        ids, mask = [], []
        for row, ones in zip(rows, masks):
            more = max(0, length - len(row)) if padding else 0
            if more and self.pad_token_id is None:
                raise UserError(
                    "this tokenizer has no padding token: set tokenizer.pad_token_id, to tokenizer.eos_token_id for one"
                )
            fill, none = [self.pad_token_id] * more, [0] * more
            on_left = self.padding_side == "left"
            ids.append([*fill, *row] if on_left else [*row, *fill])
            mask.append([*none, *ones] if on_left else [*ones, *none])
        return BatchEncoding(
            {"input_ids": _tensor(ids, return_tensors), "attention_mask": _tensor(mask, return_tensors)}
        )

    def batch_decode(self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each sequence of ids [tokens]."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        tools: Tools | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        **template_kwargs: Any,
    ) -> Any:
        """The ids [tokens] of `encode_chat` (a batch of one with `return_tensors`), or the text if `tokenize` is False.

        `template_kwargs` are the template's own switches, such as `enable_thinking`. Raises `UserError` for unsupported
        arguments of transformers, and for several conversations at once.
        """
        for name, value in template_kwargs.items():
            if name in NO_SWITCHES and value:
                raise UserError(f"apply_chat_template: {name} is not supported: leave it out")
            if near := difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.8):
                raise UserError(f"apply_chat_template: unknown argument {name!r}; did you mean {near[0]!r}?")
        switches = {name: value for name, value in template_kwargs.items() if name not in NO_SWITCHES}
        if not tokenize:
            names = {**self._names, **switches}
            return chat.render(self._template(), messages, add_generation_prompt, tools, **names)
        ids = self.encode_chat(messages, add_generation_prompt, tools, switches).ids
        if return_dict:
            made = self.pad([ids], return_tensors=return_tensors)
            return made if return_tensors else BatchEncoding({name: value[0] for name, value in made.items()})
        return ids if return_tensors is None else _tensor([ids], return_tensors)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token in the vocabulary's spelling, or a list of ids for several; None if unknown."""
        find = self._tokenizer.token_to_id
        return find(tokens) if isinstance(tokens, str) else [find(one) for one in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The vocabulary's spelling of an id, or a list for several ids [tokens]."""
        spell = self._tokenizer.id_to_token
        return spell(ids) if isinstance(ids, int) else [spell(int(one)) for one in ids]

    def get_vocab(self) -> dict[str, int]:
        """All tokens in the vocabulary's spelling, with their ids."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def eos_token(self) -> str:
        return self._names["eos_token"]

    @property
    def bos_token(self) -> str | None:
        return self._names.get("bos_token")

    @property
    def pad_token(self) -> str | None:
        """The spelling of `pad_token_id`. May be set to any special token; raises `UserError` for another one."""
        return next((token for token, index in self.special_tokens.items() if index == self.pad_token_id), None)

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        if token not in self.special_tokens:
            raise UserError(f"pad_token {token!r}: not a special token of this tokenizer")
        self.pad_token_id = self.special_tokens[token]


def _mask_of(row: Any) -> list[int]:
    """The attention mask [tokens] of a row of `pad`. Raises `UserError` for a mapping with other keys."""
    if not isinstance(row, Mapping):
        return [1] * len(row)
    if {*row} - {"attention_mask"} != {"input_ids"}:
        raise UserError(f"pad: expected input_ids and attention_mask, found {', '.join(map(str, row))}")
    return [*map(int, row.get("attention_mask", [1] * len(row["input_ids"])))]


def _choice(name: str, value: Any, names: Mapping[str, Any]) -> Any:
    """The meaning of `value`: True, False, None or one of `names`. Raises `UserError` for another value."""
    if isinstance(value, bool | None):
        return bool(value)
    if value not in names:
        raise UserError(f"{name} {value!r}: expected True or False; {did_you_mean(str(value), names)}")
    return names[value]


def _tensor(rows: list[list[Any]], kind: str | None) -> Any:
    """The rows as lists (None), a torch tensor ("pt") or a numpy array ("np"), [rows, tokens]. Raises `UserError`."""
    if kind is None:
        return rows
    if len({len(row) for row in rows}) > 1:
        raise UserError("texts of different lengths make no tensor: pass padding=True")
    if kind == "np":
        return np.array(rows, dtype=np.int64)
    if kind != "pt":
        raise UserError(f"return_tensors {kind!r}: expected 'pt' or 'np'")
    import torch

    return torch.tensor(rows, dtype=torch.long)
