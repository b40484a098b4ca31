"""Rules of `tokenizer_class` in `tokenizer_config.json`, for classes that `transformers` 5 builds in its own way.

For these it takes only the vocabulary, the merges and, mostly, the post-processor from `tokenizer.json`. The classes
of language models are built here likewise; for any other class there is a warning that the ids may differ.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slmkit.config import warn_once
from slmkit.tokenizer.byte_level import is_byte_level

PLAIN = {"", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend"}
SENTENCEPIECE = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"}
LETTERS = {"Qwen2Tokenizer": r"\p{L}", "Qwen3_5Tokenizer": r"\p{L}\p{M}"}
BYTE_LEVEL = {"GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer", *LETTERS}
QWEN = (  # its pre-tokenizer pattern; LETTERS is replaced by the letters
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[LETTERS]+|\p{N}| ?[^\sLETTERS\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def as_its_class_does(tokenizer: Tokenizer, config: dict[str, Any], bos_token: str) -> Tokenizer:
    """The tokenizer with the rules of the config's class; warns if they are unknown."""
    named = str(config.get("tokenizer_class") or "")
    name, spaced = named.removesuffix("Fast"), config.get("add_prefix_space")
    is_bpe, bytes_spelled = isinstance(tokenizer.model, models.BPE), is_byte_level(tokenizer)
    if name in BYTE_LEVEL and is_bpe and bytes_spelled:
        _byte_level(tokenizer, name, bool(spaced))
    elif name in SENTENCEPIECE and is_bpe and not bytes_spelled:
        _sentencepiece(tokenizer, name, spaced is not False, bool(config.get("legacy")))
    elif name == "T5Tokenizer" and isinstance(tokenizer.model, models.Unigram):
        _t5(tokenizer)
    elif named not in PLAIN and not (name == "LlamaTokenizer" and bytes_spelled):  # used as in the file
        warn_once(
            f"tokenizer_class {named!r}: transformers may build this class by rules of its own, and the ids used here "
            "are those of tokenizer.json as it stands; if they are right, set tokenizer_class to "
            "'PreTrainedTokenizerFast' in tokenizer_config.json"
        )
    begins = tokenizer.token_to_id(bos_token)
    if name == "CodeLlamaTokenizer" and begins is not None:  # replaces the file's post-processor
        pair = [bos_token, "$A", bos_token, "$B:1"]
        tokenizer.post_processor = processors.TemplateProcessing(pair[:2], pair, [(bos_token, begins)])
    return tokenizer


def _byte_level(tokenizer: Tokenizer, name: str, adds_space: bool) -> None:
    splits = pre_tokenizers.ByteLevel(adds_space, use_regex=name not in LETTERS)
    tokenizer.model.ignore_merges = False
    tokenizer.normalizer = None if name == "GPT2Tokenizer" else normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = splits, decoders.ByteLevel()
    if name in LETTERS:
        words = pre_tokenizers.Split(Regex(QWEN.replace("LETTERS", LETTERS[name])), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, splits])
    if name == "CohereTokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splits])
    if name == "GPTNeoXTokenizer":
        tokenizer.post_processor = None


def _sentencepiece(tokenizer: Tokenizer, name: str, adds_space: bool, legacy: bool) -> None:
    """A space before the first word of a text and, if `legacy`, after special tokens; Gemma's has none."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if name == "GemmaTokenizer":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        scheme = ("always" if legacy and name == "LlamaTokenizer" else "first") if adds_space else "never"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        parts += [decoders.Strip(" ", 1, 0)] if adds_space or name == "CodeLlamaTokenizer" else []
    tokenizer.decoder = decoders.Sequence(parts)


def _t5(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.to_str())
    normalizer = content["normalizer"] or {}
    charts = [part for part in [normalizer, *normalizer.get("normalizers", [])] if part.get("type") == "Precompiled"]
    content |= {"normalizer": charts[0] if charts else None}
    content["model"] |= {"unk_id": 2, "byte_fallback": False}
    rebuilt = Tokenizer.from_str(json.dumps(content))
    spaces = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    tokenizer.model, tokenizer.normalizer = rebuilt.model, rebuilt.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always", split=True)
    end = tokenizer.token_to_id("</s>")
    if end is not None:
        pair = ["$A", "</s>", "$B:1", "</s>:1"]
        tokenizer.post_processor = processors.TemplateProcessing(pair[:2], pair, [("</s>", end)])
