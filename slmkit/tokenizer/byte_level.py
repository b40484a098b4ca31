"""Byte-level BPE: every text is bytes, every byte is a token, and merges of frequent pairs make longer tokens.

GPT-2 (Radford et al. 2019, section 2.2) writes each byte as one printable character, so that a vocabulary is readable
JSON; here is that alphabet, a vocabulary of bytes alone, its training, and the bytes that each token stands for.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from slmkit.config import UserError

END_OF_TEXT, PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, PADDING, TURN_START, TURN_END)  # ids 0 to 3
SMALLEST = len(SPECIALS) + 256

LONGEST_WORD = 256  # bytes of a word that merges are learned from; longer ones are cut, in training alone
# A pair seen once is an accident of the text.
MIN_FREQUENCY = 2

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's spelling of a byte


def _byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes: itself where it is printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, others = [], 0
    for byte in range(256):
        characters.append(chr(byte) if byte in printable else chr(0x100 + others))
        others += byte not in printable
    return characters


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def untrained() -> Tokenizer:
    """The special tokens and the 256 bytes, no merges: usable as it is.

    The bytes stand in the order of their characters, as the trainer puts them, so that training keeps their ids.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *sorted(BYTE_CHARACTERS)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # llama.cpp has this very pre-tokenizer under the name "gpt-2": an exported vocabulary splits text there as here.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    # In training it stands before every document, so that it stands before every prompt too, whoever loads this.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B:1", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def trained(texts: Iterable[str], vocab_size: int, show_progress: bool) -> Tokenizer:
    """`untrained`, and the merges most frequent in `texts` up to `vocab_size` tokens, or as many as there are.

    Raises `UserError` when `texts` holds no text, or is one string instead of several.
    """
    if isinstance(texts, str):
        raise UserError("expected several texts to train on, found one string: put it into a list")
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIALS),
        initial_alphabet=BYTE_CHARACTERS,
        # The library ends each of its three bars with an empty line on stdout, whether or not there is a terminal.
        show_progress=show_progress and sys.stderr.isatty() and sys.stdout.isatty(),
    )
    # The time that a merge takes grows with the length of the words it stands in: text without spaces is one word.
    splits = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.train_from_iterator(_at_least_one(texts), trainer)
    tokenizer.pre_tokenizer = splits
    return tokenizer


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is written in `BYTE_CHARACTERS`, which its decoder tells."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def holds_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether any text has tokens: each of the 256 bytes is one."""
    if not isinstance(tokenizer.model, models.BPE):
        return bool(getattr(tokenizer.model, "byte_fallback", False)) and _has_all(tokenizer, "<0x{:02X}>")
    if is_byte_level(tokenizer):
        return all(tokenizer.token_to_id(character) is not None for character in BYTE_CHARACTERS)
    return bool(tokenizer.model.byte_fallback) and _has_all(tokenizer, "<0x{:02X}>")


def _has_all(tokenizer: Tokenizer, spelling: str) -> bool:
    return all(tokenizer.token_to_id(spelling.format(byte)) is not None for byte in range(256))


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each id stands for, [largest id + 1]; None where the vocabulary has a gap.

    Added tokens are spelled as they are, never in `BYTE_CHARACTERS`; the library's own decoder mistakes `č` for a
    carriage return there. A vocabulary that is not byte-level is read as SentencePiece writes it: `▁` for a space.
    """
    of_token = _byte_level_token if is_byte_level(tokenizer) else _sentencepiece_token
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (1 + max(vocabulary.values()))
    for token, index in vocabulary.items():
        table[index] = of_token(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        table[index] = added.content.encode()
    return table


def byte_token_id(tokenizer: Tokenizer, byte: int) -> int:
    """The id of the token that is one byte. Raises `UserError` for a vocabulary without it."""
    token = BYTE_CHARACTERS[byte] if is_byte_level(tokenizer) else f"<0x{byte:02X}>"
    index = tokenizer.token_to_id(token)
    if index is None:
        raise UserError(
            f"this vocabulary has no token for the byte 0x{byte:02X}: "
            "give it valid UTF-8, or use a byte-level tokenizer"
        )
    return int(index)


def spelled_bytes(token: str) -> bytes:
    """The bytes that `BYTE_CHARACTERS` spell. Raises `KeyError` for another character."""
    return bytes([_BYTE_OF[character] for character in token])


def _byte_level_token(token: str) -> bytes:
    try:
        return spelled_bytes(token)
    except KeyError:  # a foreign vocabulary may hold control tokens that it does not declare as added
        return token.encode()


def _sentencepiece_token(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _at_least_one(texts: Iterable[str]) -> Iterator[str]:
    """The texts, halves of surrogate pairs (which are no text) made `?`."""
    found = False
    for text in texts:
        found = found or bool(text)
        yield _SURROGATE.sub("?", text)
    if not found:
        raise UserError("no text to train a tokenizer on: expected at least one that is not empty")
