"""`SLMTokenizer`: text, bytes and conversations to token ids and back, without loss.

User text never becomes a special token: ordinary encoding reads `<|im_end|>` as ten characters. Only the chat template
writes special tokens, the beginning-of-text token included.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from slmkit.config import UserError, methods_checked
from slmkit.files.find import find_tokenizer_directory
from slmkit.tokenizer import byte_level, chat, chat_prompt, directory
from slmkit.tokenizer.byte_level import SPECIALS
from slmkit.tokenizer.calling import CallableTokenizer
from slmkit.tokenizer.chat import ChatTokens, Message, Tools
from slmkit.tokenizer.directory import ChatFormat, find_format
from slmkit.tokenizer.encoder import PROBE, SURROGATE, ChatRow, RenderedChat, RenderedRow, TextEncoder

# End-of-text tokens, tried in this order if neither the config nor the chat template names one.
ENDS_OF_TEXT = (byte_level.END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
LOST = 0.001  # tolerated share of characters without a token
ENDS_OF_TURN = (byte_level.TURN_END, "<|eot_id|>", "<end_of_turn>")


@methods_checked
class SLMTokenizer(CallableTokenizer):
    """A trainable byte-level BPE, or any Hugging Face `tokenizer.json` through `from_pretrained`.

    `chat_template` (Jinja, can be set) is None if a loaded tokenizer has none. `special_tokens` is spelling → id, like
    `added_words`, added tokens that any text may contain. `pad_token_id` is None if a loaded tokenizer has no padding.
    """

    chat_template: str | None
    special_tokens: dict[str, int]
    added_words: dict[str, int]
    eos_token_id: int
    pad_token_id: int | None

    def __init__(self, vocab_size: int = 16384) -> None:
        """Create a tokenizer of four special tokens and the 256 bytes; `train` adds merges up to `vocab_size` tokens.

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
        """Set the vocabulary and special tokens' roles from the config. Raises `UserError` without an end of text."""
        self._config, self._post_processor = config, tokenizer.post_processor
        self.beginning, self.ending = directory.bos_and_eos_ids(tokenizer)
        tokenizer.post_processor = None  # it may trim offsets; the two lines above have its tokens
        self._tokenizer, self._encoder = tokenizer, TextEncoder(tokenizer)
        self.special_tokens = self._encoder.special
        self.added_words = {token.content: index for index, token in self._encoder.added.items() if not token.special}
        named = directory.named_tokens(config)
        eos = named.get("eos_token") or next((token for token in ENDS_OF_TEXT if token in self.special_tokens), None)
        if eos is None:
            raise UserError(f"this tokenizer has no end-of-text token: name one as eos_token in its {directory.CONFIG}")
        self._names = named | {"eos_token": eos}  # variables for the chat template
        self.eos_token_id = self.special_tokens[eos]
        self.pad_token_id = self.special_tokens.get(named.get("pad_token", ""))
        self.further_stops: set[int] = set()  # ids in the model's generation_config.json
        self.suppressed: list[int] = []  # ids never generated, also from that file
        longest = config.get("model_max_length")  # transformers writes 1e30 for one without a limit
        self.model_max_length = longest if isinstance(longest, int) and longest <= 10**20 else None

    def _whole(self) -> Tokenizer:
        """A copy of the library's tokenizer with its post-processor."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.post_processor = self._post_processor
        return tokenizer

    # -- training, saving, loading ------------------------------------------------------------------------------------

    def train(self, texts: Iterable[str], show_progress: bool = False) -> None:
        """Learn merges up to `vocab_size` tokens, or fewer if no pair in `texts` repeats.

        Special tokens and bytes keep their ids; earlier merges are replaced. Counts of all distinct words are held in
        memory: for more than a few gigabytes of text, pass a sample. Raises `UserError` if there is no text, and for a
        loaded tokenizer, since models rely on its ids.
        """
        if self._target is None:
            raise UserError("a loaded tokenizer cannot be trained, since models rely on its ids: train a new one")
        self._use(byte_level.trained(texts, self._target, show_progress), self._config)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` reads too.

        Raises `UserError` if they cannot be written.
        """
        directory.write(save_directory, directory.Contents(self._whole(), self._config, self.chat_template))

    @classmethod
    def from_pretrained(cls, model_directory: str | Path) -> SLMTokenizer:
        """Load a tokenizer from a directory with a `tokenizer.json`, from a run, or from the hub by name.

        `tokenizer_config.json` names the end-of-text and padding tokens and has the chat template (or
        `chat_template.jinja` does). Raises `UserError` with the path for missing and damaged files.
        """
        contents = directory.read(find_tokenizer_directory(model_directory))
        tokenizer = contents.tokenizer
        tokenizer.no_truncation()  # some files set a maximum length, which would cut text silently
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for spelling, key in directory.special_spellings(contents.config).items():
            if spelling in known:
                continue
            if tokenizer.token_to_id(spelling) is not None:
                tokenizer.add_special_tokens([spelling])  # special only in the config; keeps its id
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
        """This tokenizer with another chat template and further tokens, whose ids follow the existing ones.

        `chat_template` is `chatml`, `llama3`, `gemma` or a Jinja file; missing special tokens of the three named
        templates are added. `added_tokens` are recognised in any text, `additional_special_tokens` only in what a
        template writes. Existing tokens stay unchanged. A model needs an embedding row for each new id: see
        `slmkit.model.initialization`. Raises `UserError` for an unknown template, an empty token, and for a token named
        as both kinds.
        """
        chosen = ChatFormat(self.chat_template) if chat_template is None else find_format(chat_template)
        bos = None if "bos_token" in self._names else chosen.bos_token  # an existing beginning-of-text token is kept
        special = [token for token in chosen.tokens if bos or token != chosen.bos_token]
        special += additional_special_tokens
        for token in (*added_tokens, *special):
            if not token.strip():
                raise UserError(f"an added token is {token!r}: expected text")
            if token in added_tokens and (token in special or token in self.special_tokens):
                raise UserError(f"{token!r} is a special token: drop it from tokenizer.added_tokens")
        tokenizer = self._whole()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        words = [word for word in added_tokens if len(self.encode(word)) > 1]
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
        added = [token for token in (*special, *words) if token not in (self.special_tokens | self.added_words)]
        config = directory.with_tokens(self._config, tokenizer, added, bos)
        return self._loaded(tokenizer, config, chosen.template)

    def pieces_of_new_tokens(self, before: SLMTokenizer) -> dict[int, list[int]]:
        """New id → the ids [tokens] that the tokenizer `before` gives for the same text."""
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
        """Token ids [tokens] of a text. Special tokens in it are recognised only with `allow_special`.

        Lone surrogates are encoded with "surrogatepass"; with `allow_special` each becomes U+FFFD. Raises `UserError`
        for anything but one string.
        """
        if not isinstance(text, str):
            raise UserError(f"encode: expected one text, found {type(text).__name__}; for several: encode_batch")
        return self._encoder.encode_special(text) if allow_special else self._encoder.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[np.ndarray]:
        """`encode` of each text, uint32 [tokens] each, on `threads` threads (default: one per core)."""
        return self._encoder.encode_batch(texts, threads)

    def check_losses(self) -> None:
        """Raise `UserError` if more than 0.1 % of the characters encoded in batches had no token and were lost."""
        read, lost = self._encoder.read, self._encoder.lost
        if lost > LOST * read:
            raise UserError(
                f"this tokenizer loses {lost / read:.1%} of the text ({lost:,} of {read:,} characters have no token): "
                "use one that is made for such text, or train one on it (tokenizer.vocab_size, without tokenizer.path)"
            )

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids [tokens] of text that continues other text: no space is put before it."""
        return self._encoder.encode_continuation(text)

    @property
    def depends_on_context(self) -> bool:
        """Whether parts of a text, encoded separately, may give other tokens than the whole."""
        return self._encoder.fast is None

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids [tokens] of bytes: valid UTF-8 as text, every other byte as its own token.

        Raises `UserError` for invalid UTF-8 if a loaded tokenizer has no byte tokens.
        """
        return self._encoder.encode_bytes(data)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids [tokens] of a prompt: this tokenizer's `beginning`, then the text; never empty."""
        return [*self.beginning, *self.encode(text)] or [self.eos_token_id]

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids [tokens], or of one id; bytes that are not UTF-8 become U+FFFD.

        Raises `UserError` for an unknown id, and for several sequences of ids.
        """
        special = self.special_tokens.values()
        try:
            row = [operator.index(ids)] if getattr(ids, "ndim", isinstance(ids, Iterable)) == 0 else [*ids]  # type: ignore
            row = [operator.index(index) for index in row]
        except TypeError:
            row = None
        if row is None or getattr(ids, "ndim", 1) > 1:
            raise UserError("decode: expected the ids of one text; for several rows: batch_decode")
        row = [index for index in row if not (skip_special_tokens and index in special)]
        return self.decode_bytes(row).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids [tokens]; empty for an id below `vocab_size` that training has not used yet.

        Raises `UserError` for an id outside the vocabulary.
        """
        unfilled = range(len(self), self.vocab_size)
        ids = [int(index) for index in ids if int(index) not in unfilled]
        pieces = [self.token_bytes(index) for index in ids]
        if self._encoder.is_byte_level:
            return b"".join(pieces)
        # Other vocabularies have rules that depend on neighbours, such as the space at the beginning of a text.
        return self._tokenizer.decode(ids, skip_special_tokens=False).encode()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, for streaming; not always whole characters.

        A special token's are its spelling. Raises `UserError` for an id outside the vocabulary.
        """
        found = self._encoder.bytes[token_id] if 0 <= token_id < len(self._encoder.bytes) else None
        if found is None:
            raise UserError(f"token id {token_id} is not in this vocabulary: expected 0 to {len(self) - 1}")
        return found

    # -- conversations ------------------------------------------------------------------------------------------------

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> ChatTokens:
        """Token ids [tokens] of a conversation, and which are learned: the assistant's answers with their end of turn.

        `messages` are `{"role": …, "content": …}`: at most one system message, then user and assistant in turn; an
        assistant's message with `"weight": 0` is not learned. `add_generation_prompt` appends the generation prompt, so
        that the model can answer. Special tokens spelled in a message are ordinary text. `switches` go to the template,
        such as `enable_thinking`. Raises `UserError` for invalid messages and for a tokenizer without chat template.
        """
        (rows,) = self.encode_rendered([self.render_chat(messages, add_generation_prompt, tools, switches)], threads=1)
        return rows[-1].to_lists()

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """The text of `encode_chat`, cut at special tokens. Raises `UserError` as it does."""
        chat.check_messages(messages)
        shielded, tools, marker = chat.shield(messages, tools, self._encoder.spelled)
        stops = self.stop_token_ids
        ends = [token for token, index in self.special_tokens.items() if index in stops]
        names = {**self._names, **(switches or {})}
        rows = chat.rows_of_segments(self._template(), shielded, ends, add_generation_prompt, tools, **names)
        return [self._joined(row, marker) for row in rows]

    def chat_prompt_text(self, messages: Sequence[Message], tools: Tools | None = None, **how: Any) -> str:
        """`encode_chat_prompt` as text: a special token and a message that spells it look alike there."""
        return chat_prompt.prompt_of(self._template(), messages, tools, self._names, **how)

    def encode_chat_prompt(self, messages: Sequence[Message], tools: Tools | None = None, **how: Any) -> list[int]:
        """Token ids [tokens] of a conversation with which a model goes on: see `chat_prompt.prompt_of`."""
        shielded, tools, marker = chat.shield(messages, tools, self._encoder.spelled)
        text = self.chat_prompt_text(shielded, tools, **how)
        return self._encoder.encode_rows([self._joined([chat.Segment(text, False)], marker)], 1)[0].ids.tolist()

    @property
    def call_format(self) -> chat_prompt.CallFormat | None:
        """How the chat template writes calls of tools; None without a template, or if not as JSON."""
        template = self.chat_template
        return chat_prompt.call_format(template, tuple(self._names.items())) if template else None

    @property
    def longest_token(self) -> int:
        """The bytes of the longest token: a text of more bytes than `longest_token` times n has more than n tokens."""
        return max(len(spelled or b"") for spelled in self._encoder.bytes)

    def _joined(self, segments: Sequence[chat.Segment], marker: str) -> RenderedRow:
        """The text of a row; if messages spell special tokens, the template's own get their secret spellings. Halves of
        surrogate pairs, which are no text, become U+FFFD.
        """
        text, learned = "", []
        own = re.compile(self._encoder.spelled.pattern + f"(?!{marker})") if marker else None
        secret = dict(zip(self.special_tokens, self._encoder.secret))
        for segment in segments:
            start = len(text)
            part = own.sub(lambda match: secret[match[0]], segment.text).replace(marker, "") if own else segment.text
            text += part
            if segment.trained:
                learned.append((start, len(text)))
        return RenderedRow(SURROGATE.sub("\ufffd", text), learned, shielded=own is not None)

    def encode_rendered(self, chats: Sequence[RenderedChat], threads: int | None = None) -> list[list[ChatRow]]:
        """All rows of each conversation, on `threads` threads (default: one per core); see `rows_to_learn`."""
        rows = iter(self._encoder.encode_rows([row for chat in chats for row in chat], threads))
        return [[next(rows) for _ in chat] for chat in chats]

    def prompt_is_prefix(self) -> bool:
        """Whether the generation prompt's tokens are those before an answer in a conversation; not if its last
        characters merge with the answer's first, as line ends do in GPT-2's vocabulary.
        """
        asked = [{"role": "user", "content": "?"}]
        prompt = self.encode_chat(asked, add_generation_prompt=True).ids
        return self.encode_chat([*asked, {"role": "assistant", "content": chat.REPLY}]).ids[: len(prompt)] == prompt

    def _template(self) -> str:
        if self.chat_template is None:
            what = "this tokenizer has no chat template, so it cannot hold a conversation"
            raise UserError(f"{what}: set chat_template in its {directory.CONFIG}, or use a chat model's tokenizer")
        return self.chat_template

    # -- what it is ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of ids, equal to the rows of a model's embedding."""
        return len(self._encoder.bytes)

    @property
    def vocab_size(self) -> int:
        """The requested size; for a loaded tokenizer, its length."""
        return len(self) if self._target is None else self._target

    @property
    def end_of_turn_id(self) -> int:
        """The token that the chat template writes after an answer; without one, a well-known end-of-turn token."""
        found, ids = None, self.special_tokens | self.added_words
        if self.chat_template is not None:
            found = chat.end_of_turn(self.chat_template, tuple(ids), tuple(self._names.items()))
        known = (token for token in (*ENDS_OF_TURN, self._names["eos_token"]) if token in self.special_tokens)
        return ids[found or next(known)]

    @property
    def stop_token_ids(self) -> set[int]:
        """Ids that end generation: end of text, end of turn, and `further_stops`."""
        return {self.eos_token_id, self.end_of_turn_id, *self.further_stops}

    def use_generation_config(self, content: Mapping[str, Any]) -> None:
        """Set `further_stops` and `suppressed` from the content of a model's `generation_config.json`."""
        ends = content.get("eos_token_id")
        self.further_stops = {ends} if isinstance(ends, int) else {*(ends or [])}
        self.suppressed = content.get("suppress_tokens") or []

    @property
    def known_ids(self) -> np.ndarray:
        """Which ids may be generated, bool [ids]. A vocabulary may have gaps, and a model's head may be wider."""
        return np.array([t is not None and i not in self.suppressed for i, t in enumerate(self._encoder.bytes)])

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-text token, if there is one; only the chat template writes it."""
        return self.special_tokens.get(self._names.get("bos_token", ""))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of vocabulary, merges, special tokens and the ids of `PROBE`. Equal after saving and loading.

        The probe covers pre-tokenizer and normalizer, whose serialization changes between versions of the library.
        """
        content = json.loads(self._tokenizer.to_str())
        parts = [content["model"].get("vocab"), content["model"].get("merges"), self.special_tokens, self.encode(PROBE)]
        parts += [self.added_words] if self.added_words else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
