"""Converts `tiktoken`'s GPT-2 vocabulary to a `tokenizer.json`, for `tokenizer.path: gpt2`.

tiktoken downloads the vocabulary once into TIKTOKEN_CACHE_DIR (else a temporary folder); afterwards no network is
needed. Ids are tiktoken's, `<|endoftext|>` (50256) included.
"""

from __future__ import annotations

import itertools
from typing import Any

import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from slmkit.config import UserError
from slmkit.tokenizer.byte_level import BYTE_CHARACTERS, END_OF_TEXT

CONFIG: dict[str, Any] = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer. Raises `UserError` if tiktoken has no vocabulary and cannot download it."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # any error of the download
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"tokenizer gpt2: tiktoken cannot load its vocabulary ({reason}): "
            "go online once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    ranks = encoding._mergeable_ranks
    vocabulary = {_spelled(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: encoding.eot_token}
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[str, str]:
    """The two parts whose merge gives the token: merges the pair of lowest rank until two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(one + following, len(ranks)) for one, following in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return _spelled(parts[0]), _spelled(parts[1])


def _spelled(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)
