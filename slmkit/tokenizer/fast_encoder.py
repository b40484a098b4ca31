"""Encodes with tiktoken's core: the same ids as `tokenizers`, several times as fast.

`tokenizers` merges the pair that comes first in its list of merges, tiktoken the pair whose joined bytes have the
lowest rank. Both look only at the two tokens of a merge, so a token that occurs while encoding a text also occurs when
its bytes are encoded alone. Hence a token that its own bytes do not give never occurs and can be left out, and every
other token T is only made by the last merge of its own bytes. Let that merge's position be T's rank: if each token
ranks above its two parts, both libraries do the same merges in the same order. `FastEncoder.of` checks this for every
token of a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tiktoken import _tiktoken  # type: ignore[attr-defined]
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import Split

from slmkit.tokenizer.byte_level import BYTE_CHARACTERS, last_merge, spelled_bytes

# GPT-2's pattern. Alternatives without look-around come first: tiktoken runs those in a much faster engine.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+$|\s+(?!\S)|\s"
CLASSES = Split(Regex(r"\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|\s+"), "isolated")  # GPT-2's never cuts in such a run

# The time of merging per byte grows with a word's length: words longer than this (characters) are cut.
LONG = 2048
SEPARATOR = "\ufdd0"  # a Unicode noncharacter, reserved for internal use
OVERLAP = 4  # tokens of overlap between the parts of a long word


class FastEncoder:
    """Text to ids, for tokenizers for which the ids are certain to be the same (see `of`)."""

    def __init__(self, ranks: dict[bytes, int], id_of_rank: np.ndarray) -> None:
        """`id_of_rank`: uint32 [largest rank + 1]."""
        # `encode_array` needs at least one special token in the core, even if none is allowed: without any, its search
        # stops at every character.
        self._core = _tiktoken.CoreBPE(ranks, {SEPARATOR: len(id_of_rank)}, WORDS)
        self._separator = len(id_of_rank)
        self._bytes_of = {rank: token for token, rank in ranks.items()}
        self._id_of_rank = None if np.array_equal(id_of_rank, np.arange(len(id_of_rank))) else id_of_rank

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FastEncoder | None:
        """The encoder; None if ids could differ: another pre-tokenizer, a normalizer, added tokens in ordinary text."""
        content = json.loads(tokenizer.to_str())
        if not (_is_plain_bpe(content["model"]) and _splits_like_gpt2(content)):
            return None
        vocabulary: dict[str, int] = content["model"]["vocab"]
        ranks = _ranks(vocabulary, [(first, second) for first, second in content["model"]["merges"]])
        if ranks is None:
            return None
        in_order = [vocabulary[token] for token in sorted(ranks, key=ranks.__getitem__)]
        if all(one < following for one, following in pairwise(in_order[len(BYTE_CHARACTERS) :])):
            ranks = {token: vocabulary[token] for token in ranks}  # ids in the order of ranks: no table needed
        id_of_rank = np.arange(1 + max(ranks.values()), dtype=np.uint32)
        for token, rank in ranks.items():
            id_of_rank[rank] = vocabulary[token]
        return cls({spelled_bytes(token): rank for token, rank in ranks.items()}, id_of_rank)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids, uint32 [tokens], without a Python integer per token. Raises `UnicodeEncodeError` for lone surrogates."""
        if cuts := cuts_in_long_words(text):
            ranks = np.array(self._encode_in_parts(text, cuts), dtype=np.uint32)
        else:
            ranks = np.frombuffer(self._core.encode_to_tiktoken_buffer(text, set()), dtype=np.uint32)
        return ranks if self._id_of_rank is None else self._id_of_rank[ranks]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each text, uint32 [tokens] each, in one call to the core to save its overhead."""
        joined = SEPARATOR.join(texts)
        if len(texts) < 2 or joined.count(SEPARATOR) != len(texts) - 1 or cuts_in_long_words(joined):
            return [self.encode_array(text) for text in texts]
        ranks = np.frombuffer(self._core.encode_to_tiktoken_buffer(joined, {SEPARATOR}), dtype=np.uint32)
        stops = [*np.flatnonzero(ranks == self._separator).tolist(), len(ranks)]
        parts = [ranks[start:stop] for start, stop in zip([0, *(stop + 1 for stop in stops)], stops)]
        return parts if self._id_of_rank is None else [self._id_of_rank[part] for part in parts]

    def _encode_in_parts(self, text: str, cuts: list[int]) -> list[int]:
        """Ranks [tokens] of a text with long words, encoded in parts; each overlaps the end of the one before.

        Two neighbours encode their bytes in the same way in both parts unless a merge within two tokens differs. So if
        a part begins with the same token as the previous part has there, the cut changes nothing. If not, the text is
        encoded whole.
        """
        done: list[int] = []
        part, last_cut = self._core.encode_ordinary(text[: cuts[0]]), cuts[0]
        for cut in [*cuts[1:], len(text)]:
            kept = len(part) - OVERLAP
            overlap = b"".join(self._bytes_of[rank] for rank in part[kept:])
            while 0x80 <= overlap[0] < 0xC0:  # inside a UTF-8 character
                kept -= 1
                overlap = self._bytes_of[part[kept]] + overlap
            start = last_cut - len(overlap.decode())
            following = self._core.encode_ordinary(text[start:cut])
            if last_cut - start > LONG // 2 or following[0] != part[kept]:
                return self._core.encode_ordinary(text)
            done += part[:kept]
            part, last_cut = following, cut
        return done + part


def cuts_in_long_words(text: str) -> list[int]:
    """Positions [cuts] with at least `LONG` characters of one class, that is of one word, on either side."""
    cuts = []
    before = ""  # the previous block, if it is of one class
    for start in range(0, len(text) - LONG + 1, LONG) if len(text) >= 2 * LONG else ():
        block = text[start : start + LONG]
        # A cheap test first, which suffices for nearly all text.
        is_one_class = (" " not in block or block.isspace()) and _is_one_class(block)
        if is_one_class and before and _is_one_class(before[0] + block[0]):
            cuts.append(start)
        before = block if is_one_class else ""
    return cuts


def _is_one_class(text: str) -> bool:
    return len(CLASSES.pre_tokenize_str("".join(set(text)))) == 1


def _is_plain_bpe(model: dict[str, Any]) -> bool:
    """Whether it is byte-level BPE without options that change the merges."""
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model.get("type") == "BPE"
        and not any(model.get(option) for option in options)
        and all(character in model["vocab"] for character in BYTE_CHARACTERS)
    )


def _splits_like_gpt2(content: dict[str, Any]) -> bool:
    """Whether words are split as GPT-2's, without normalizer or added tokens that occur in ordinary text."""
    words = content["pre_tokenizer"] or {}
    asked = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        content["normalizer"] is None
        and {"use_regex": True} | words == {"use_regex": True} | words | asked
        and all(token["special"] for token in content["added_tokens"])
    )


def _ranks(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, int] | None:
    """The rank of each token that can occur (see the module's docstring); None if a part ranks above its token."""
    rank_of_merge = {merge: rank for rank, merge in enumerate(merges, start=len(BYTE_CHARACTERS))}
    made_by: dict[str, list[tuple[str, str]]] = {}
    for first, second in merges:
        made_by.setdefault(first + second, []).append((first, second))
    ranks = {character: rank for rank, character in enumerate(BYTE_CHARACTERS)}
    plain = models.BPE(vocabulary, merges)
    last_merges = {}
    for token, candidates in made_by.items():
        if len(plain.tokenize(token)) == 1:
            last_merges[token] = candidates[0] if len(candidates) == 1 else last_merge(token, rank_of_merge.get)
            ranks[token] = rank_of_merge[last_merges[token]]
    for token, parts in last_merges.items():
        if not all(part in ranks and ranks[part] < ranks[token] for part in parts):
            return None
    return ranks
