"""What runtimes are asked, so that they can be compared: texts of all scripts, conversations, and ids to continue."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmkit.config import UserError
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer

Message = dict[str, str]
SENTENCES = (
    "Once upon a time a small fox lived at the edge of a forest. Every morning it went down to the river, "
    "and every evening it told its sister what it had seen there."
)
# Text that tokenizers read differently from each other: contractions, numbers, spaces, line ends, code, emoji.
PIECES = (
    " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "\x00", "\x1b[0m",
    "'s", "'LL", "’re", "don't", "I'M", "1", "12", "123", "1234567", "3.14", "1,000", "٣٤٥", "२०२६", "Ⅷ", "½", "x²",
    "for i in range(10):\n    print(i)", "</div>", "a_b.c(d)[0] += 1;", "{\"k\": [1, null]}", "//", "#!", "\\n", "===",
    "🙂", "👩‍🚀", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301", "A\u030a\u0323", "ﬁ", "ß", "ẞ", "İ", "ǅ", "한국어", "日本語です",
    "我们在这里", "각", "ไทย", "नमस्ते",
)  # fmt: skip
TAGGED = 20  # conversations with special tokens in a message
MOST_LETTERS = 400  # of a script, the first, which are the usual ones


@dataclass(frozen=True)
class Probe:
    """What runtimes are asked: the same for the same model and tokenizer."""

    strings: list[str]
    decomposed: frozenset[str]  # strings that the tokenizer brings into Unicode's normal form C first
    conversations: list[list[Message]]
    tagged: list[list[Message]]  # with special tokens spelled in the messages
    readings: list[list[list[int]]]  # of each: their ids as ordinary text, and as tokens, as transformers reads them
    prompts: list[tuple[list[int], list[int]]]  # ids [tokens], and the lengths after which the next token is predicted
    start: list[int]  # ids [tokens] after which greedy tokens are compared
    count: int  # of greedy tokens
    holes: frozenset[int] = frozenset()  # rows without a token, which some runtimes never choose

    @classmethod
    def of(
        cls, decoder: Decoder, tokenizer: SLMTokenizer, strings: int = 10_000, conversations: int = 200,
        count: int = 256,
    ) -> Probe:  # fmt: skip
        """Texts of all scripts; positions also past each window and past the original context, where there are some."""
        rng, most = random.Random(17), decoder.max_positions - 1
        known = [index for index in np.flatnonzero(tokenizer.known_ids).tolist() if index < decoder.vocab_size]
        edges = {layer.window or 0 for layer in decoder.architecture.layers}
        edges |= {int(getattr(rope.scaling, "original_max_position_embeddings", 0)) for rope in decoder.ropes}
        last = min(most, max(256, max(edges) + 64))
        lengths = {1, 2, 30, 200, last, *(edge + more for edge in edges for more in (-1, 0, 1, 40))}
        start = tokenizer.encode_prompt(SENTENCES)[: max(1, most // 2)]
        texts = probe_strings((*tokenizer.special_tokens, *tokenizer.added_words), strings)
        plain, tagged = _conversations(tokenizer, texts, conversations)
        prompts = [
            (rng.choices(known, k=last), sorted(length for length in lengths if 0 < length <= last)),
            (start, [*range(1, len(start) + 1, 4)]),
        ]
        readings = [[ids, _read_openly(tokenizer, ids)] for ids in map(tokenizer.encode_chat_prompt, tagged)]
        normalizer = tokenizer._tokenizer.normalizer
        composes = normalizer is not None and normalizer.normalize_str("e\u0301") == "é"
        decomposed = frozenset(text for text in texts if composes and not unicodedata.is_normalized("NFC", text))
        count, holes = min(count, most - len(start)), frozenset(range(decoder.vocab_size)) - {*known}
        return cls(texts, decomposed, plain, tagged, readings, prompts, start, count, holes)

    @property
    def context(self) -> int:
        """The tokens of the longest text, with its continuation."""
        return max(len(self.start) + self.count, *(len(ids) + 1 for ids, _ in self.prompts))


def probe_strings(spellings: Sequence[str], count: int) -> list[str]:
    """`count` texts of up to 12 pieces: words of each script, of English, `PIECES`, any characters, `spellings`."""
    rng, (anything, scripts) = random.Random(23), _characters()
    endless = [itertools.cycle(rng.sample(letters, len(letters))) for letters in scripts]
    texts = []
    for letters in itertools.islice(itertools.cycle(endless), count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.5:
                part = "".join(itertools.islice(letters, rng.randint(1, 8)))
            else:
                part = rng.choice(
                    rng.choice((SENTENCES.split(), string.printable, PIECES, anything, spellings or PIECES))
                )
            parts.append(part + rng.choice(("", "", " ")))
        texts.append("".join(parts))
    return texts


@functools.cache
def _characters() -> tuple[list[str], list[list[str]]]:
    """All that can be printed, and the first letters of each script."""
    scripts = dict[str, list[str]]()
    anything = [*filter(str.isprintable, map(chr, range(0x32000)))]
    for character in anything:
        if unicodedata.category(character)[0] in "LMN":  # a script is the first word of a letter's name
            scripts.setdefault(unicodedata.name(character, "other").split()[0], []).append(character)
    return anything, [letters[:MOST_LETTERS] for letters in scripts.values()]


def _conversations(
    tokenizer: SLMTokenizer, texts: Sequence[str], count: int
) -> tuple[list[list[Message]], list[list[Message]]]:
    """Conversations that the chat template renders: about `count` without special tokens in a message, a few with."""
    if tokenizer.chat_template is None:
        return [], []
    rng, found, special = random.Random(29), list[list[Message]](), (*tokenizer.special_tokens,)
    said = [text for text in texts if text.strip() and not any(token in text for token in special)] or ["Hello!"]
    for number in range(count):
        roles = [*["system"] * (number % 3 == 0), *["user", "assistant"] * rng.randint(0, 2), "user"]
        messages = [{"role": role, "content": rng.choice(said)} for role in roles]
        with contextlib.suppress(UserError):  # some templates take no system message
            if (ids := tokenizer.encode_chat_prompt(messages)) and messages not in found:
                found.append(messages)
    is_open = found and _read_openly(tokenizer, ids) == ids
    tagged = [[{"role": "user", "content": f"What does {token} mean?"}] for token in special[:TAGGED]]
    return found, tagged if is_open else []


def _read_openly(tokenizer: SLMTokenizer, ids: list[int]) -> list[int]:
    """The ids [tokens] of the text of `ids` with special tokens recognised wherever they are spelled."""
    return tokenizer.encode(tokenizer.decode(ids), allow_special=True)
