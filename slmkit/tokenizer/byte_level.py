"""Byte-level BPE: each of the 256 bytes is a token, and merges of frequent pairs form longer tokens.

GPT-2 (Radford et al. 2019, section 2.2) writes each byte as one printable character, so that a vocabulary is readable
JSON. This module has that alphabet, the vocabulary without merges, its training, GPT-2's own vocabulary, and the bytes
of each token.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from slmkit.config import UserError

END_OF_TEXT, PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, PADDING, TURN_START, TURN_END)  # ids 0 to 3
SMALLEST = len(SPECIALS) + 256

LONGEST_WORD = 256  # bytes; in training, longer words are cut
# A pair must occur at least twice to be merged.
MIN_FREQUENCY = 2

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's spelling of a byte


def _byte_characters() -> list[str]:
    """The character for each of the 256 bytes: the byte's own if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, others = [], 0
    for byte in range(256):
        characters.append(chr(byte) if byte in printable else chr(0x100 + others))
        others += byte not in printable
    return characters


BYTE_CHARACTERS = _byte_characters()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp has the same pre-tokenizer under the name "gpt-2", so an exported vocabulary splits text alike.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def untrained() -> Tokenizer:
    """A usable tokenizer of the special tokens and the 256 bytes, without merges.

    The bytes are in the order of their characters, like the trainer's, so that training keeps their ids.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *sorted(BYTE_CHARACTERS)])}
    tokenizer = _byte_level_bpe(vocabulary, [], SPECIALS)
    # In training the end-of-text token precedes every document; the post-processor puts it before every prompt.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B:1", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def trained(texts: Iterable[str], vocab_size: int, show_progress: bool) -> Tokenizer:
    """`untrained` plus the most frequent merges in `texts`, up to `vocab_size` tokens or until no pair repeats.

    Raises `UserError` if `texts` has no text or is a single string.
    """
    if isinstance(texts, str):
        raise UserError("expected several texts to train on, found one string: put it into a list")
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(SPECIALS),
        initial_alphabet=BYTE_CHARACTERS,
        # The library ends its progress bars with empty lines on stdout, with or without a terminal.
        show_progress=show_progress and sys.stderr.isatty() and sys.stdout.isatty(),
    )
    # A merge takes time in proportion to the length of its words, and text without spaces is one word: cut words.
    splits = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.train_from_iterator(_at_least_one(texts), trainer)
    tokenizer.pre_tokenizer = splits
    return tokenizer


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, of `tiktoken`'s vocabulary: ids are tiktoken's, `<|endoftext|>` (50256) included.

    tiktoken downloads it once into TIKTOKEN_CACHE_DIR (else a temporary folder); afterwards no network is needed.
    Raises `UserError` if it cannot.
    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # any error of the download
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"tokenizer gpt2: tiktoken cannot load its vocabulary ({reason}): "
            "go online once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    ranks = {
        "".join(BYTE_CHARACTERS[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()
    }
    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [last_merge(token, lambda pair: ranks.get("".join(pair))) for token in in_order if len(token) > 1]
    return _byte_level_bpe(ranks | {END_OF_TEXT: encoding.eot_token}, merges, [END_OF_TEXT])


def last_merge(token: str, rank: Callable[[tuple[str, str]], int | None]) -> tuple[str, str]:
    """The two parts whose merge gives the token: merges the pair of lowest `rank` until two are left.

    `rank` of a pair that is not merged is None.
    """
    parts = list(token)
    while len(parts) > 2:
        ranked = [(rank(pair), place) for place, pair in enumerate(pairwise(parts))]
        _, place = min((number, place) for number, place in ranked if number is not None)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is spelled in `BYTE_CHARACTERS`, according to its decoder."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def fallback_bytes(tokenizer: Tokenizer) -> list[str]:
    """The 256 spellings of the bytes that stand for unknown characters; empty if the model does not do that."""
    model = tokenizer.model
    # Only BPE has the attribute, so look at what the library writes; no string in JSON can hold these quotes.
    falls_back = (
        model.byte_fallback if isinstance(model, models.BPE) else b'"byte_fallback":true' in model.__getstate__()
    )
    return [f"<0x{byte:02X}>" for byte in range(256)] if falls_back else []


def holds_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether the model is BPE and each of the 256 bytes is a token, so that any text can be encoded."""
    spellings = BYTE_CHARACTERS if is_byte_level(tokenizer) else fallback_bytes(tokenizer)
    is_spelled = bool(spellings) and all(tokenizer.token_to_id(spelling) is not None for spelling in spellings)
    return is_spelled and isinstance(tokenizer.model, models.BPE)


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of each id, [largest id + 1]; None for an unused id.

    Added tokens are spelled as plain text, not in `BYTE_CHARACTERS`; the library's decoder would read `č` in one as a
    carriage return. A vocabulary that is not byte-level is read like SentencePiece's: `▁` is a space.
    """
    of_token = _byte_level_token if is_byte_level(tokenizer) else _sentencepiece_token
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (1 + max(vocabulary.values()))
    for token, index in vocabulary.items():
        table[index] = of_token(token)
    of_bytes = {*fallback_bytes(tokenizer)}  # some files declare these as added, and even as special
    for index, added in tokenizer.get_added_tokens_decoder().items():
        if added.content not in of_bytes:
            table[index] = added.content.encode()
    return table


def byte_token_id(tokenizer: Tokenizer, byte: int) -> int:
    """The id of a single byte's token. Raises `UserError` if the vocabulary has none."""
    token = BYTE_CHARACTERS[byte] if is_byte_level(tokenizer) else f"<0x{byte:02X}>"
    index = tokenizer.token_to_id(token)
    if index is None:
        raise UserError(
            f"this vocabulary has no token for the byte 0x{byte:02X}: "
            "give it valid UTF-8, or use a byte-level tokenizer"
        )
    return int(index)


def spelled_bytes(token: str) -> bytes:
    """The bytes of a token spelled in `BYTE_CHARACTERS`. Raises `KeyError` for another character."""
    return bytes([_BYTE_OF[character] for character in token])


def _byte_level_token(token: str) -> bytes:
    try:
        return spelled_bytes(token)
    except KeyError:  # some vocabularies have control tokens not declared as added
        return token.encode()


def _sentencepiece_token(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _at_least_one(texts: Iterable[str]) -> Iterator[str]:
    """The texts, lone surrogates replaced by `?`. Raises `UserError` if all are empty."""
    found = False
    for text in texts:
        found = found or bool(text)
        yield _SURROGATE.sub("?", text)
    if not found:
        raise UserError("no text to train a tokenizer on: expected at least one that is not empty")
