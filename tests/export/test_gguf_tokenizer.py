"""A tokenizer in GGUF: llama.cpp's ids are those of Python, for each kind that llama.cpp has; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from slmkit import SLMTokenizer, UserError
from slmkit.export.compare import EXACT, Probe, compare, probe_strings
from slmkit.export.gguf import write_gguf
from slmkit.export.gguf_tokenizer import PRE, RAW
from slmkit.export.llama_cpp import LlamaCpp
from slmkit.export.runtimes import Slmkit
from tests.export.small_model import loaded, write_small
from tests.export.tiny_gguf import CONTEXT, describe_model, write_tiny_gguf
from tests.tokenizer import kinds
from tests.tokenizer.conftest import LLAMA_TEMPLATE, TEXTS
from tests.tokenizer.kinds import CONFIG, REAL, directory_of, with_bos

STRINGS = 150
CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def split_by(patterns: tuple[str, ...], whole_words: bool) -> Tokenizer:
    """A byte-level BPE trained behind these regular expressions."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [
        *TEXTS,
        *probe_strings((), 150),
        "in 1984 and 2026, 123456 of 7890 DON'T We'LL I'm HELLO World CamelCase",
    ] * 2
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, template: str | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    content |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def in_llama_cpp(folder: Path, rows: int | None = None) -> LlamaCpp:
    """A model with the folder's tokenizer, opened by llama.cpp."""
    if not (folder / "config.json").exists():
        describe_model(folder, SLMTokenizer.from_pretrained(folder))
    return LlamaCpp(write_tiny_gguf(folder, folder / "tiny.gguf", rows), CONTEXT)


def metadata(folder: Path, rows: int | None = None) -> dict[str, Any]:
    """What is written, by its name without `tokenizer.ggml.`."""
    if not (folder / "config.json").exists():
        describe_model(folder, SLMTokenizer.from_pretrained(folder))
    reader = gguf.GGUFReader(write_tiny_gguf(folder, folder / "tiny.gguf", rows))
    fields = reader.fields.items()
    return {name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents() for name, field in fields}


def refusal(folder: Path, rows: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        metadata(folder, rows)
    assert "\n" not in str(error.value)
    return str(error.value)


def different(folder: Path, strings: int = STRINGS) -> list[str]:
    """The strings whose ids in llama.cpp are not those of Python."""
    tokenizer = SLMTokenizer.from_pretrained(folder)
    texts = probe_strings((*tokenizer.special_tokens, *tokenizer.added_words), strings)
    with in_llama_cpp(folder) as runtime:
        return [text for text in texts if runtime.encode(text) != tokenizer.encode(text)]


# -- how text is split and merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRE)
def test_each_splitting_gives_the_ids_of_python(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, split_by(*PRE[name]))
    assert metadata(folder)["pre"] == name
    assert different(folder) == []


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-bos", "byte-level-trims"])
def test_kinds_that_llama_cpp_has(kind: str, tmp_path: Path) -> None:
    assert different(directory_of(kind, tmp_path)) == []


@pytest.mark.parametrize("kind", ["gemma-like", "metaspace-never"])
def test_merges_by_rank_of_characters(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained by `tokenizers`: only one pair makes each token, so that SentencePiece's merging would make others."""
    monkeypatch.setattr(kinds, "TEXTS", [" ".join(text.split()) for text in TEXTS])  # no merges over line ends
    folder = directory_of(kind, tmp_path)
    assert metadata(folder)["pre"] == RAW
    assert different(folder) == []


@pytest.mark.parametrize("kind", REAL)
def test_real_tokenizers(kind: str, tmp_path: Path) -> None:
    folder = directory_of(kind, tmp_path)
    if kind == "torchtune-tiny":
        assert "without a token for each byte" in refusal(folder)
        return
    if kind in ("llama2", "tinystories-sp8192"):
        # By the rules of LlamaTokenizer, a space is before the first word of a text alone.
        assert "llama.cpp puts a space before text after each special token" in refusal(folder)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(CONFIG | {"pad_token": "</s>"})
        )  # as the file itself says
    assert different(folder) == []
    if kind in ("llama2", "tinystories-sp8192"):
        assert gguf.GGUFReader(folder / "tiny.gguf").fields["tokenizer.ggml.model"].contents() == "llama"


REFUSED: dict[str, str] = {
    "wordpiece": "WordPiece",
    "word-level": "WordLevel",
    "unigram-first": "Unigram",
    "byte-level-prefix": '"add_prefix_space": true',
    "byte-level-words": "the rule single_word",
    "llama3-like": "the splitting",
    "metaspace-first": '"prepend_scheme": "first"',
    "metaspace-always": '"prepend_scheme": "always"',
    "metaspace-split": "Metaspace",
    "gemma-like": "merges that are not those of a SentencePiece model",
    "prepend": "merges that are not those of a SentencePiece model",
    "llama-class": "Metaspace",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llama_cpp_does_not_have_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    said = refusal(directory_of(kind, tmp_path))
    assert "llama.cpp does not have this tokenizer" in said
    assert REFUSED[kind] in said


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.NFD()])
def test_other_normalizers_are_refused(normalizer: Any, tmp_path: Path) -> None:
    tokenizer = split_by(*PRE["gpt-2"])
    tokenizer.normalizer = normalizer
    assert f"the normalizer {type(normalizer).__name__}" in refusal(save(tmp_path, tokenizer))


def test_text_outside_normal_form_c_is_counted_and_left_out(tmp_path: Path) -> None:
    """Qwen's tokenizer composes characters first, which llama.cpp does not do."""
    tokenizer = split_by(*PRE["qwen2"])
    tokenizer.normalizer = normalizers.NFC()
    write_small(tmp_path, vocab_size=tokenizer.get_vocab_size())
    save(tmp_path, tokenizer)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | {"eos_token_id": tokenizer.token_to_id("</s>")}))
    decoder, ours = loaded(tmp_path)
    probe = Probe.of(decoder, ours, strings=STRINGS, conversations=0, count=4)
    write_gguf(tmp_path, tmp_path / "model.gguf", "F32")
    with LlamaCpp(tmp_path / "model.gguf", probe.context) as runtime:
        parity = compare(Slmkit(decoder, ours, 0), runtime, probe, EXACT)
        assert runtime.encode("e\u0301") != ours.encode("e\u0301")
    assert parity.passed, parity.failures
    left_out = parity.checks["token ids"]["not in normal form C"]
    assert 0 < left_out == STRINGS - parity.checks["token ids"]["compared"]


def test_a_pattern_that_differs_in_one_character_is_refused(tmp_path: Path) -> None:
    (pattern,), whole = PRE["llama-bpe"]
    assert "the splitting" in refusal(save(tmp_path, split_by((pattern.replace("{1,3}", "{1,2}"),), whole)))


def test_whole_words_matter_only_where_merges_do_not_make_them(tmp_path: Path) -> None:
    tokenizer = split_by(PRE["gpt-2"][0], whole_words=True)
    assert metadata(save(tmp_path / "made", tokenizer))["pre"] == "gpt-2"
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:-1]  # the last token is one as a whole word alone
    assert "ignore_merges: true" in refusal(save(tmp_path / "not", Tokenizer.from_str(json.dumps(content))))


# -- types of tokens, rows, ends --------------------------------------------------------------------------------------


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    """Special tokens, and added ones that are not, one of them known to llama.cpp."""
    tokenizer = split_by(*PRE["gpt-2"])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "<|fim_prefix|>")])
    return save(tmp_path, tokenizer, CHATML, eos_token="<|im_end|>", bos_token="<s>")


def test_types_are_those_of_the_tokens(typed: Path) -> None:
    found = metadata(typed, rows=1300)
    types = dict(zip(found["tokens"], found["token_type"]))
    assert types["<|im_start|>"] == types["</s>"] == gguf.TokenType.CONTROL
    assert types["<think>"] == types["<|fim_prefix|>"] == gguf.TokenType.USER_DEFINED
    assert types["e"] == gguf.TokenType.NORMAL
    assert len({*found["tokens"]}) == 1300
    assert {*found["token_type"][len(SLMTokenizer.from_pretrained(typed)) :]} == {gguf.TokenType.UNUSED}


def test_special_tokens_in_text_are_read_as_python_reads_them(typed: Path) -> None:
    """In ordinary text as text, in a rendered conversation as tokens, also where a user writes them."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(typed), SLMTokenizer.from_pretrained(typed)
    tags = ["<|im_end|>", "<think>", "a<|im_start|>b", "</s> <s>", "<|fim_prefix|>x", "<|im_end"]
    said = [text for text in probe_strings((*tags,), 500) if text.strip()][:200]
    with in_llama_cpp(typed) as runtime:
        assert [text for text in tags if runtime.encode(text) != ours.encode(text)] == []
        for number, text in enumerate(said):
            earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": tags[number % 6]}]
            messages = [*earlier[: number % 3 and 2], {"role": "user", "content": text}]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert runtime.encode_chat(messages) == expected


def test_a_conversation_begins_as_the_template_says(tmp_path: Path) -> None:
    """Whether the file's post-processor puts a beginning before each text, or the template writes it, or both."""
    for name, template, begins in (("both", LLAMA_TEMPLATE, True), ("one", CHATML, False), ("none", None, True)):
        tokenizer = split_by(*PRE["gpt-2"])
        tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        folder = save(tmp_path / name, with_bos(tokenizer), template, bos_token="<s>")
        ours = SLMTokenizer.from_pretrained(folder)
        assert metadata(folder)["add_bos_token"] is begins
        with in_llama_cpp(folder) as runtime:
            messages = [{"role": "user", "content": "Hello"}]
            expected = ours.encode_chat_prompt(messages) if template else None
            assert runtime.encode_chat(messages) == expected


def test_several_templates_keep_their_names(typed: Path) -> None:
    config = json.loads((typed / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]
    (typed / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    found = metadata(typed)
    assert (found["chat_template"], found["chat_template.tool_use"]) == (CHATML, "tools")


def ends_of(folder: Path, *ends: str, **more: Any) -> dict[str, str]:
    """The spellings of eos and eot, with these ends in generation_config.json."""
    tokenizer = SLMTokenizer.from_pretrained(folder)
    describe_model(folder, tokenizer, [tokenizer.special_tokens[end] for end in ends], **more)
    found = metadata(folder)
    return {name: found["tokens"][found[f"{name}_token_id"]] for name in ("eos", "eot")}


def test_the_base_models_end_and_the_turns_end_are_told_apart(typed: Path) -> None:
    """The tokenizer calls the turn's end its end of text, as Llama 3's does; the list has the base model's too."""
    assert ends_of(typed, "</s>", "<|im_end|>") == {"eos": "</s>", "eot": "<|im_end|>"}
    assert ends_of(typed, "<|im_end|>") == {"eos": "<|im_end|>", "eot": "<|im_end|>"}
    config = json.loads((typed / "tokenizer_config.json").read_text())
    (typed / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    assert ends_of(typed, "<|im_end|>") == {"eos": "</s>", "eot": "<|im_end|>"}


def test_both_ends_end_a_text_in_llama_cpp(typed: Path) -> None:
    """Whichever is forced: `<s>` has no spelling that llama.cpp knows as an end."""
    tokenizer = SLMTokenizer.from_pretrained(typed)
    describe_model(typed, tokenizer, [tokenizer.special_tokens[end] for end in ("<s>", "<|im_end|>")])
    with in_llama_cpp(typed) as runtime:
        for end in ("<s>", "<|im_end|>"):
            forced = [[tokenizer.special_tokens[end], 1e9]]
            assert runtime._complete([5, 6], 9, logit_bias=forced)["stop_type"] == "eos"
        assert runtime._complete([5, 6], 9, logit_bias=[[5, 1e9]])["stop_type"] == "limit"


def test_a_turns_end_that_the_model_does_not_list_ends_turns_all_the_same(typed: Path) -> None:
    """As in a base model, whose template was never learned."""
    config = json.loads((typed / "tokenizer_config.json").read_text())
    (typed / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    assert ends_of(typed) == {"eos": "</s>", "eot": "<|im_end|>"}


def test_a_turns_end_that_is_no_special_token_is_the_same_everywhere(typed: Path) -> None:
    """In llama.cpp by its role, and by `stop_token_ids` in our engine, the page and the script for ONNX Runtime."""
    config = json.loads((typed / "tokenizer_config.json").read_text())
    template = CHATML.replace("<|im_end|>", "<think>")
    (typed / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template, "eos_token": "</s>"}))
    ours = SLMTokenizer.from_pretrained(typed)
    assert ours.end_of_turn_id == ours.added_words["<think>"]
    assert ours.stop_token_ids == {ours.added_words["<think>"], ours.special_tokens["</s>"]}
    assert ends_of(typed) == {"eos": "</s>", "eot": "<think>"}


def test_rows_without_a_token_are_never_generated(typed: Path) -> None:
    """Their log-probabilities are there all the same."""
    ids = len(SLMTokenizer.from_pretrained(typed))
    how = {"temperature": 2, "samplers": ["temperature"], "return_tokens": True, "ignore_eos": True}
    with in_llama_cpp(typed, ids + 50) as runtime:
        assert runtime.log_probs([5, 6], [2]).shape == (1, ids + 50)
        assert runtime.log_probs([5, 6], [2])[0, ids:].max() > -15
        drawn: list[int] = []
        for first in range(25):
            body = {"prompt": [first], "n_predict": 200, "seed": first, **how}
            drawn += runtime._ask("POST", "/completion", **body)["tokens"]
        assert len(drawn) == 5000
        assert max(drawn) < ids


def test_ids_without_a_row_are_named(typed: Path) -> None:
    ids = len(SLMTokenizer.from_pretrained(typed))
    said = refusal(typed, rows=ids - 2)
    assert "2 ids of the tokenizer" in said or "has 2 ids without a row" in said
    assert f"{ids - 1} ('<|fim_prefix|>')" in said
