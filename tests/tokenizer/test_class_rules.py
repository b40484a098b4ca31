"""Classes that `transformers` builds by rules of their own, whatever `tokenizer.json` says: the same ids, or a word."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from slmkit.config import warn_once
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.directory import BYTE_LEVEL, SENTENCEPIECE, with_class_rules

from .kinds import CONFIG, PROSE, byte_level, prepend, unigram, with_bos

transformers = pytest.importorskip("transformers")

TEXTS = [*PROSE, "trail  ", "it's 12345 12", "the  12 cats\n\n", "e\u0301te\u0301 ｆｕｌｌ", "\ttab", "the</s> cat <s>"]
T5 = ["<pad>", "</s>", "<unk>"]  # where the class expects them


def other_rules() -> Tokenizer:
    """A byte-level tokenizer whose rules are those of no class."""
    tokenizer = with_bos(byte_level()()[0])
    tokenizer.normalizer = normalizers.Lowercase()
    digits = pre_tokenizers.Digits(individual_digits=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def code_llama() -> Tokenizer:
    tokenizer, _ = prepend()
    tokenizer.post_processor = None  # the class puts <s> before a text all the same
    return tokenizer


def t5() -> Tokenizer:
    tokenizer, _ = unigram("first")()
    scores = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = [(token, 0.0) for token in T5] + [(token, score) for token, score in scores if token not in T5]
    made = Tokenizer(models.Unigram(pieces, 2, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", made.token_to_id("<s>"))])
    made.add_special_tokens([*T5, "<s>"])
    return made


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (other_rules, {}) for name in sorted(BYTE_LEVEL)},
    "GPT2TokenizerFast": (other_rules, {"add_prefix_space": True}),
    "Qwen2TokenizerFast": (other_rules, {"add_prefix_space": True}),
    **{name: (code_llama, {}) for name in sorted(SENTENCEPIECE)},
    "CodeLlamaTokenizerFast": (code_llama, {"add_prefix_space": False}),
    "T5Tokenizer": (t5, {"extra_ids": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_class_gives_the_ids_of_transformers(tmp_path: Path, name: str) -> None:
    make, settings = CASES[name]
    make().save(str(tmp_path / "tokenizer.json"))
    config = CONFIG | {"tokenizer_class": name, **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), SLMTokenizer.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    for tokenizer in (ours, SLMTokenizer.from_pretrained(tmp_path / "again")):
        for text in TEXTS:
            ids = theirs(text).input_ids
            assert tokenizer(text).input_ids == ids, text
            assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text


def test_every_class_that_is_built_by_rules_of_its_own_is_known_or_named(caplog: pytest.LogCaptureFixture) -> None:
    """Of all that the installed `transformers` has."""
    backend = transformers.PreTrainedTokenizerFast
    found = [getattr(transformers, name, None) for name in dir(transformers) if name.endswith(("Tokenizer", "Fast"))]
    own = {kind.__name__ for kind in found if inspect.isclass(kind) and issubclass(kind, backend)} - {backend.__name__}
    assert len(own) > 20
    warn_once.cache_clear()
    for name in sorted(own - BYTE_LEVEL - SENTENCEPIECE - {"T5Tokenizer"}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            with_class_rules(Tokenizer(models.BPE()), {"tokenizer_class": name}, "<s>")
        (line,) = caplog.messages
        assert line.startswith(f"tokenizer_class {name!r}: ")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer"])
def test_where_the_file_is_obeyed_nothing_is_said(caplog: pytest.LogCaptureFixture, name: str) -> None:
    tokenizer = other_rules()
    before = tokenizer.to_str()
    assert with_class_rules(tokenizer, {"tokenizer_class": name}, "<s>").to_str() == before
    assert not caplog.messages
