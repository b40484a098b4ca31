"""`SLMTokenizer`: byte-level BPE over the `tokenizers` library, saved as Hugging Face's files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from slmkit.config import UserError
from slmkit.tokenizer import chat
from slmkit.tokenizer.chat import ChatTokens, Messages

END_OF_TEXT, PAD, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
TURN_ENDS = (TURN_END, "<|eot_id|>", "<end_of_turn>", "<|end|>")  # ChatML, Llama 3, Gemma, Phi
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the printable stand-ins of the 256 bytes
SMALLEST = len(SPECIALS) + len(BYTES)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others in order for the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of_character()


class SLMTokenizer:
    """Text to ids and back, lossless on every string and every byte sequence.

    A new one knows the 256 bytes and the special tokens and is usable at once; `train` grows it to `vocab_size`. Ids
    are special tokens first, then bytes, then merges in the order they were learned, so that growing keeps all ids.
    """

    def __init__(self, vocab_size: int = 16_384) -> None:
        if vocab_size < SMALLEST:
            raise UserError(
                f"vocab_size {vocab_size}: the 256 bytes and {len(SPECIALS)} special tokens need {SMALLEST}"
            )
        vocabulary = {token: index for index, token in enumerate((*SPECIALS, *BYTES))}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        # GPT-2's way to cut words: every engine knows it by name.
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
        self._set_up(core, vocab_size, END_OF_TEXT, PAD, chat.CHATML)

    def _set_up(
        self,
        core: Tokenizer,
        vocab_size: int,
        eos: str | None,
        pad: str | None,
        chat_template: str | None,
        bos: str = "",
    ) -> None:
        self.vocab_size = vocab_size
        self.chat_template = chat_template
        self._core = core
        self._core.encode_special_tokens = True  # text is text, whatever it spells
        added = core.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._added_bytes = {index: token.content.encode() for index, token in added.items()}
        self._is_byte_level = isinstance(core.decoder, decoders.ByteLevel)
        self._special_pattern = re.compile("(" + ("|".join(map(re.escape, self.special_tokens)) or r"(?!)") + ")")
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad
        self.bos_token_id = core.token_to_id(bos) if bos else None
        self.pad_token_id = core.token_to_id(pad) if pad else None
        end = core.token_to_id(eos) if eos else None
        if end is None:
            raise UserError(f"the tokenizer names no end-of-text token it has (eos_token is {eos!r}): set eos_token")
        self.eos_token_id: int = end
        self.end_of_turn = next((token for token in TURN_ENDS if token in self.special_tokens), str(eos))
        self.end_of_turn_id = self.special_tokens.get(self.end_of_turn, end)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, texts: Iterable[str], show_progress: bool = False) -> None:
        """Learn merges from texts until there are `vocab_size` tokens, or nothing is left to merge.

        Raises `UserError` when there is no text.
        """
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for text in texts:
                seen += len(text)
                yield text

        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=BYTES,
            show_progress=show_progress,
        )
        fresh = SLMTokenizer(self.vocab_size)
        fresh._core.train_from_iterator(counted(), trainer)
        if not seen:
            raise UserError("no text to train a tokenizer on: every document is empty")
        self._set_up(fresh._core, self.vocab_size, END_OF_TEXT, PAD, self.chat_template)

    # --- text to ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. A special token's spelling in it is ordinary text, unless `allow_special`."""
        if allow_special:
            return self._encode_with_specials(text, mark="")
        try:
            return self._core.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # half of a surrogate pair, which UTF-8 has no room for
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once, on all cores."""
        try:
            return [encoded.ids for encoded in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError):
            return [self.encode(text) for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: stretches of valid UTF-8 as text, the rest byte by byte."""
        ids: list[int] = []
        vocabulary = self._core.get_vocab()
        byte_ids = {byte: vocabulary[character] for character, byte in BYTE_OF.items()}
        while data:
            try:
                return ids + self.encode(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                ids += self.encode(data[: error.start].decode("utf-8"))
                ids += [byte_ids[byte] for byte in data[error.start : error.end]]
                data = data[error.end :]
        return ids

    # --- ids to text ----------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Raises `UserError` for an unknown id."""
        ids = list(ids)
        if not self._is_byte_level:
            return self._core.decode(ids, skip_special_tokens=skip_special_tokens)
        specials = set(self.special_tokens.values()) if skip_special_tokens else set()
        return self.decode_bytes(i for i in ids if i not in specials).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The very bytes of ids."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a special token its spelling. Raises `UserError` for an unknown id."""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        token = self._core.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise UserError(f"token id {token_id} is outside the vocabulary of {len(self)}")
        return bytes(BYTE_OF[character] for character in token) if self._is_byte_level else token.encode()

    def __len__(self) -> int:
        return self._core.get_vocab_size(with_added_tokens=True)

    @property
    def stop_token_ids(self) -> set[int]:
        """What ends an answer: the end of the turn, or of the text."""
        return {self.eos_token_id, self.end_of_turn_id}

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides which ids a text has (sha256, hex)."""
        content = json.loads(self._core.to_str())
        decides = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    # --- conversations --------------------------------------------------------------------------------------------

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = False) -> ChatTokens:
        """A conversation as the chat template writes it, with the assistant's tokens marked as trained.

        With a generation prompt it ends where the assistant is to go on. Raises `UserError` for a conversation that
        makes no sense and for a tokenizer without a template.
        """
        template = self._template()
        chat.check_messages(messages)
        guarded, mark = chat.guard(messages, list(self.special_tokens))
        ids: list[int] = []
        trained: list[bool] = []
        pieces = chat.segments(template, guarded, self.end_of_turn, **self._names)
        if add_generation_prompt:
            pieces.append(chat.Segment(chat.generation_prompt(template, guarded, **self._names), trained=False))
        for piece in pieces:  # one by one, so that what is learned is tokenized as generation will see it
            new = self._encode_with_specials(piece.text, mark)
            ids += new
            trained += [piece.trained] * len(new)
        return ChatTokens(ids, trained)

    def apply_chat_template(
        self, messages: Messages, add_generation_prompt: bool = False, tokenize: bool = True
    ) -> str | list[int]:
        """The conversation's ids, or its text, as `transformers` gives them."""
        if tokenize:
            return self.encode_chat(messages, add_generation_prompt).ids
        return chat.render(self._template(), messages, add_generation_prompt, **self._names)

    def _template(self) -> str:
        if self.chat_template is None:
            raise UserError("the tokenizer has no chat template: add chat_template to its tokenizer_config.json")
        return self.chat_template

    @property
    def _names(self) -> dict[str, Any]:
        return {"bos_token": self.bos_token or "", "eos_token": self.eos_token, "pad_token": self.pad_token}

    def _encode_with_specials(self, text: str, mark: str) -> list[int]:
        """Ids of rendered text: special spellings are special tokens; `mark` is taken out of what lies between."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self.encode(part.replace(mark, "") if mark else part)
        return ids

    # --- disk -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers.AutoTokenizer` reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token or None,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(index): {
                    "content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
                    "single_word": token.single_word, "normalized": token.normalized, "special": token.special,
                }
                for index, token in sorted(self._core.get_added_tokens_decoder().items())
            },
            "chat_template": self.chat_template,
        }  # fmt: skip
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _write(directory / "tokenizer.json", self._core.to_str(pretty=True))
            _write(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{directory}: the tokenizer cannot be written: {error}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> SLMTokenizer:
        """Read any Hugging Face `tokenizer.json` with its config. Raises `UserError` where it is missing or damaged."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a tokenizer as `slm tokenizer train` writes it")
        try:
            core = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
            raise UserError(f"{path}: not a readable tokenizer.json: {error}") from None
        config = _read_config(directory)
        tokenizer = cls.__new__(cls)
        names = {key: _content(config.get(f"{key}_token")) for key in ("eos", "pad", "bos")}
        template = config.get("chat_template")
        tokenizer._set_up(
            core,
            core.get_vocab_size(with_added_tokens=True),
            names["eos"],
            names["pad"],
            template if isinstance(template, str) else None,
            names["bos"] or "",
        )
        return tokenizer


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {type(config).__name__}")
        template = directory / "chat_template.jinja"  # where newer versions of transformers keep it
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    config.setdefault("eos_token", END_OF_TEXT)  # a bare tokenizer.json: GPT-2's name is the likeliest
    return config


def _content(token: Any) -> str | None:
    """Configs spell a token as text, or as an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _write(path: Path, content: str) -> None:
    """Replace a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(content, encoding="utf-8")
    os.replace(fresh, path)
