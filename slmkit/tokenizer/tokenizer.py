"""`SLMTokenizer`: text, bytes and conversations to token ids and back, without loss.

What a user writes can never become a special token: ordinary encoding reads `<|im_end|>` as the ten characters it is.
Only the chat template writes special tokens, the beginning of a text among them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from slmkit.config import UserError
from slmkit.find import find_tokenizer_directory
from slmkit.tokenizer import byte_level, chat, directory
from slmkit.tokenizer.byte_level import SPECIALS
from slmkit.tokenizer.chat import ChatTokens, Message, Tools
from slmkit.tokenizer.chat_formats import ChatFormat, find_format
from slmkit.tokenizer.chat_rows import ChatRow, Piece, RenderedChat, encode_pieces, rows_to_learn
from slmkit.tokenizer.fast_encoder import FastEncoder

# Tried in this order where a tokenizer's config does not say, or its chat template.
ENDS_OF_TEXT = (byte_level.END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
ENDS_OF_TURN = (byte_level.TURN_END, "<|eot_id|>", "<end_of_turn>")

PROBE = "The cat  sat; it's 12345.\n\n\tCAFÉ cafe\u0301 ﬁ ½ x_y=f(z)!!! 猫が座った 🐈\r\n "

_INVALID_UTF8 = re.compile("([\udc80-\udcff]+)")  # what errors="surrogateescape" makes of bytes that are not UTF-8


class SLMTokenizer:
    """A byte-level BPE of its own, or any Hugging Face `tokenizer.json` through `from_pretrained`.

    `chat_template` is Jinja and can be set; None where a loaded tokenizer has none. `special_tokens` maps spelling to
    id, and so does `added_words`: tokens beside the merges that any text may hold. `pad_token_id` is None where a
    loaded tokenizer has no padding.
    """

    chat_template: str | None
    special_tokens: dict[str, int]
    added_words: dict[str, int]
    eos_token_id: int
    pad_token_id: int | None

    def __init__(self, vocab_size: int = 16384) -> None:
        """Four special tokens and the 256 bytes; `train` then adds merges up to `vocab_size` tokens in all.

        Raises `UserError` for a `vocab_size` below 260.
        """
        if vocab_size < byte_level.SMALLEST:
            raise UserError(
                f"vocab_size {vocab_size}: the 256 bytes and {len(SPECIALS)} special tokens need {byte_level.SMALLEST}"
            )
        self._target: int | None = vocab_size
        self.chat_template = find_format("chatml").template
        self._use(byte_level.untrained(), directory.own_config())

    def _use(self, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        """Take this vocabulary, and from the config what its special tokens are for."""
        self._tokenizer, self._config = tokenizer, config
        self.__dict__.pop("_fast", None)  # of the vocabulary before
        self._tokenizer.encode_special_tokens = True  # the library's name for: their spelling is ordinary text
        self._bytes = byte_level.bytes_of_tokens(tokenizer)  # by id; None in a gap
        self._is_byte_level = byte_level.is_byte_level(tokenizer)
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        self._special = {index: token for index, token in added if token.special}
        self.added_words = {token.content: index for index, token in added if not token.special}
        self.special_tokens = {token.content: index for index, token in self._special.items()}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._spellings = "|".join(map(re.escape, longest_first))
        named = directory.named_tokens(config)
        eos = named.get("eos_token") or next((token for token in ENDS_OF_TEXT if token in self.special_tokens), None)
        if eos is None:
            raise UserError(f"this tokenizer has no end-of-text token: name one as eos_token in its {directory.CONFIG}")
        self._names = named | {"eos_token": eos}  # what the chat template may use
        self.eos_token_id = self.special_tokens[eos]
        self.pad_token_id = self.special_tokens.get(named.get("pad_token", ""))

    @cached_property
    def _fast(self) -> FastEncoder | None:
        """Made when first needed, in about a tenth of a second; None where only `tokenizers` gives these ids."""
        encoder = FastEncoder.of(self._tokenizer)
        is_sure = encoder and encoder.encode(PROBE) == self._tokenizer.encode(PROBE, add_special_tokens=False).ids
        return encoder if is_sure else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fast"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies, and other processes, get the vocabulary without this one setting of the library's."""
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True

    # -- training, saving, loading ------------------------------------------------------------------------------------

    def train(self, texts: Iterable[str], show_progress: bool = False) -> None:
        """Learn merges until there are `vocab_size` tokens; fewer where `texts` holds no more pairs that repeat.

        Special tokens and bytes keep their ids; merges learned before are replaced. Counts of all distinct words are
        held in memory: for more than a few gigabytes of text, give a sample. Raises `UserError` for no text at all,
        and for a loaded tokenizer, whose ids a model already knows.
        """
        if self._target is None:
            raise UserError("a loaded tokenizer cannot be trained, since models rely on its ids: train a new one")
        self._use(byte_level.trained(texts, self._target, show_progress), self._config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads too.

        Raises `UserError` where they cannot be written.
        """
        directory.write(save_directory, directory.Contents(self._tokenizer, self._config, self.chat_template))

    @classmethod
    def from_pretrained(cls, model_directory: str | Path) -> SLMTokenizer:
        """Load any directory with a `tokenizer.json`: saved here, by `transformers`, or downloaded with a model; a run;
        or a model of the hub, by name.

        Its `tokenizer_config.json` says which tokens end a text and pad, and holds the chat template (or
        `chat_template.jinja` does). Raises `UserError` for missing and damaged files, with their path.
        """
        contents = directory.read(find_tokenizer_directory(model_directory))
        tokenizer = contents.tokenizer
        tokenizer.no_truncation()  # some files come with a length of their own; a corpus is never cut silently
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for spelling, key in directory.special_spellings(contents.config).items():
            if spelling in known:
                continue
            if tokenizer.token_to_id(spelling) is not None:
                tokenizer.add_special_tokens([spelling])  # tokenizer.json forgot that it is special; it keeps its id
            elif key in ("eos_token", "pad_token"):
                job = "end-of-text" if key == "eos_token" else "padding"
                raise UserError(
                    f"{Path(model_directory) / directory.CONFIG}: names no {job} token that {directory.TOKENIZER} has "
                    f"({key} is {spelling!r}): take both files from one tokenizer"
                )
        return cls._loaded(tokenizer, contents.config, contents.chat_template)

    def extended(
        self,
        chat_template: str | None = None,
        added_tokens: Sequence[str] = (),
        additional_special_tokens: Sequence[str] = (),
    ) -> SLMTokenizer:
        """This tokenizer with another chat template and further tokens, behind all ids that there are.

        `chat_template` is `chatml`, `llama3`, `gemma` or a Jinja file; what one of the named three is written with is
        added where it is missing. `added_tokens` are recognised in any text, `additional_special_tokens` only in what a
        template writes. What is one token already stays as it is. Models need a row for each new id: see
        `slmkit.model.growth`. Raises `UserError` for an unknown template, an empty token, and for one named as both.
        """
        chosen = ChatFormat(self.chat_template) if chat_template is None else find_format(chat_template)
        bos = None if "bos_token" in self._names else chosen.bos_token  # one of its own goes on to begin texts
        special = [token for token in chosen.tokens if bos or token != chosen.bos_token]
        special += additional_special_tokens
        for token in (*added_tokens, *special):
            if not token.strip():
                raise UserError(f"an added token is {token!r}: expected text")
            if token in added_tokens and (token in special or token in self.special_tokens):
                raise UserError(f"{token!r} is a special token: drop it from tokenizer.added_tokens")
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        words = [word for word in added_tokens if len(self.encode(word)) > 1]
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
        added = [token for token in (*special, *words) if token not in (self.special_tokens | self.added_words)]
        config = directory.with_tokens(self._config, tokenizer, added, bos)
        return self._loaded(tokenizer, config, chosen.template)

    def pieces_of_new_tokens(self, before: SLMTokenizer) -> dict[int, list[int]]:
        """Of each id that `before` does not have, the ids that it made of the same text."""
        added = (self.special_tokens | self.added_words).items()
        return {index: before.encode(spelling) for spelling, index in added if index >= len(before)}

    @classmethod
    def _loaded(cls, tokenizer: Tokenizer, config: dict[str, Any], chat_template: str | None) -> SLMTokenizer:
        loaded = cls.__new__(cls)
        loaded._target, loaded.chat_template = None, chat_template
        loaded._use(tokenizer, config)
        return loaded

    # -- text and bytes -----------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of any string. Special tokens are recognised in it only where `allow_special` says so.

        A half of a surrogate pair becomes the three bytes that UTF-8 would give it ("surrogatepass").
        """
        if allow_special:
            return self._encode_with_special(text)
        try:
            if self._fast:
                return self._fast.encode(text)
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # neither library takes half a surrogate pair
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as uint32 [tokens], without a Python integer for each."""
        try:
            if self._fast:
                return self._fast.encode_array(text)
        except UnicodeEncodeError:
            pass
        return np.array(self.encode(text), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """`encode_array` of each text, on so many threads (default: one a core): the way to tokenize a corpus."""
        if self._fast:
            threads = threads or os.cpu_count() or 1
            if threads == 1:
                return self._encode_here(texts)
            parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
            with ThreadPoolExecutor(threads) as pool:
                return list(itertools.chain.from_iterable(pool.map(self._encode_here, parts)))
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            return [self.encode_array(text) for text in texts]
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_here(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            if self._fast:
                return self._fast.encode_arrays(texts)
        except UnicodeEncodeError:
            pass
        return [self.encode_array(text) for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any bytes: what is valid UTF-8 as text, every other byte as its own token.

        Raises `UserError` for bytes that a loaded tokenizer without byte tokens cannot hold.
        """
        ids: list[int] = []
        pieces = _INVALID_UTF8.split(data.decode("utf-8", "surrogateescape"))  # text, invalid, text, invalid, …, text
        for index, piece in enumerate(pieces):
            if index % 2:
                invalid = piece.encode("utf-8", "surrogateescape")
                ids += [byte_level.byte_token_id(self._tokenizer, byte) for byte in invalid]
            else:
                ids += self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises `UserError` for an unknown id."""
        ids = [int(index) for index in ids if not (skip_special_tokens and int(index) in self._special)]
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Exactly the bytes that `ids` stand for. Raises `UserError` for an id outside the vocabulary."""
        ids = [int(index) for index in ids]
        pieces = [self.token_bytes(index) for index in ids]
        if self._is_byte_level:
            return b"".join(pieces)
        # Other vocabularies have rules between tokens, such as the space that begins a text.
        return self._tokenizer.decode(ids, skip_special_tokens=False).encode()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, to show a text as it is written: not always whole characters.

        A special token's are its spelling. Raises `UserError` for an id outside the vocabulary.
        """
        found = self._bytes[token_id] if 0 <= token_id < len(self._bytes) else None
        if found is None:
            raise UserError(f"token id {token_id} is not in this vocabulary: expected 0 to {len(self) - 1}")
        return found

    # -- conversations ------------------------------------------------------------------------------------------------

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> ChatTokens:
        """Token ids of a conversation, and which of them are learned: what the assistant says and its end of turn.

        `messages` are `{"role": …, "content": …}`: a system message or none, then user and assistant in turn; what the
        assistant says in a message of `"weight": 0` is not learned. With `add_generation_prompt` the ids are what a
        model is given to answer, and what training put before the answer. A special token spelled in a message is
        ordinary text. Raises `UserError` for anything else.
        """
        (rows,) = self.encode_rendered([self.render_chat(messages, add_generation_prompt, tools)], threads=1)
        return rows[-1].to_lists()

    def encode_chat_rows(self, messages: Sequence[Message], tools: Tools | None = None) -> list[ChatTokens]:
        """A conversation to learn from, every turn of the assistant's in one row: nearly always all of them.

        Several rows where the template writes a turn differently once others follow (see `chat.rows_of_segments`).
        """
        (rows,) = self.encode_rendered([self.render_chat(messages, tools=tools)], threads=1)
        return [row.to_lists() for row in rows_to_learn(rows)]

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> RenderedChat:
        """The first half of `encode_chat`: the text that the template makes, cut at its special tokens."""
        shielded, tools, marker = chat.shield(messages, tools, re.compile(self._spellings))
        stops = self.stop_token_ids
        ends = [token for token, index in self.special_tokens.items() if index in stops]
        rows = chat.rows_of_segments(self._template(), shielded, ends, add_generation_prompt, tools, **self._names)
        return [
            [Piece(part, text.trained) for text in row for part in self._cut_at_special(text.text, marker)]
            or [Piece("", False)]
            for row in rows
        ]

    def encode_rendered(self, chats: Sequence[RenderedChat], threads: int | None = None) -> list[list[ChatRow]]:
        """All rows of each conversation, on so many threads (default: one a core)."""
        return encode_pieces(chats, functools.partial(self.encode_batch, threads=threads))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        tools: Tools | None = None,
    ) -> list[int] | str:
        """The ids of `encode_chat`, or the rendered text where `tokenize` is False, as in `transformers`."""
        if tokenize:
            return self.encode_chat(messages, add_generation_prompt, tools).ids
        return chat.render(self._template(), messages, add_generation_prompt, tools, **self._names)

    def _template(self) -> str:
        if self.chat_template is None:
            raise UserError(
                f"this tokenizer has no chat template, so it cannot hold a conversation: set chat_template in its "
                f"{directory.CONFIG}, or use an instruction-tuned model's tokenizer"
            )
        return self.chat_template

    def _encode_with_special(self, text: str) -> list[int]:
        parts = self._cut_at_special(text, marker="")
        return [index for part in parts for index in ([part] if isinstance(part, int) else self.encode(part))]

    def _cut_at_special(self, text: str, marker: str) -> Iterator[str | int]:
        """Text, and special tokens by their ids, but those spelled with `marker`s, which go (see `chat.shield`)."""
        unmarked = f"(?!{marker})" if marker else ""
        done = 0
        for match in re.finditer(rf"({self._spellings}){unmarked}(\s*)", text):
            index = self.special_tokens[match[1]]
            token = self._special[index]
            before = text[done : match.start()].replace(marker, "")
            # Some foreign special tokens swallow the white space beside them.
            yield before.rstrip() if token.lstrip else before
            yield index
            done = match.end() if token.rstrip else match.end(1)
        yield text[done:].replace(marker, "")

    # -- what it is ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of ids: a model's embedding needs as many rows."""
        return len(self._bytes)

    @property
    def vocab_size(self) -> int:
        """The size asked for; of a loaded tokenizer, its length."""
        return len(self) if self._target is None else self._target

    @property
    def end_of_turn_id(self) -> int:
        """The token that the chat template writes behind what the assistant says; known ones where it writes none."""
        found = None
        if self.chat_template is not None:
            found = chat.end_of_turn(self.chat_template, tuple(self.special_tokens), tuple(self._names.items()))
        known = (token for token in (*ENDS_OF_TURN, self._names["eos_token"]) if token in self.special_tokens)
        return self.special_tokens[found or next(known)]

    @property
    def stop_token_ids(self) -> set[int]:
        """Whatever ends generation: the end of the text and the end of a turn."""
        return {self.eos_token_id, self.end_of_turn_id}

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, where the vocabulary has one: the chat template writes it, nobody else."""
        return self.special_tokens.get(self._names.get("bos_token", ""))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over vocabulary, merges, special tokens and the ids of `PROBE`. Equal after saving and loading.

        The probe stands for how text is split and normalized: how the library writes that down changes as it grows.
        """
        content = json.loads(self._tokenizer.to_str())
        parts = [content["model"].get("vocab"), content["model"].get("merges"), self.special_tokens, self.encode(PROBE)]
        parts += [self.added_words] if self.added_words else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
