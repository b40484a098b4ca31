"""A saved tokenizer is the same one again, others' tokenizers load, and damaged files are named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer

from .conftest import TEXTS

TEXT = "".join(TEXTS[:4]) + " <|im_end|> \ud83d ½"


def test_saving_and_loading_gives_the_same_tokenizer(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "new" / "directory")
    loaded = SLMTokenizer.from_pretrained(tmp_path / "new" / "directory")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.encode(TEXT, allow_special=True) == tokenizer.encode(TEXT, allow_special=True)
    assert loaded.chat_template == tokenizer.chat_template
    for name in ("eos_token_id", "pad_token_id", "end_of_turn_id", "special_tokens", "stop_token_ids"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.vocab_size == len(loaded) == 400


def test_saving_what_was_loaded_changes_no_file(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "a")
    SLMTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "a")) == ["tokenizer.json", "tokenizer_config.json"]
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_save_that_fails_leaves_the_old_files(
    tokenizer: SLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SLMTokenizer().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match="No space left"):
        tokenizer.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_tokenizers_template_does_not_survive_a_save(tokenizer: SLMTokenizer, gemma_directory: Path) -> None:
    tokenizer.save_pretrained(gemma_directory)
    assert SLMTokenizer.from_pretrained(gemma_directory).chat_template == tokenizer.chat_template


def test_gpt2s_tokenizer_loads_without_named_tokens(gpt2_directory: Path) -> None:
    loaded = SLMTokenizer.from_pretrained(gpt2_directory)
    eos = len(loaded) - 1
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.end_of_turn_id) == (eos, None, eos)
    assert loaded.stop_token_ids == {eos}
    assert loaded.chat_template is None
    assert loaded.decode_bytes(loaded.encode(TEXT)) == TEXT.encode("utf-8", "surrogatepass")
    assert loaded.encode("a<|endoftext|>", allow_special=True)[-1] == eos != loaded.encode("a<|endoftext|>")[-1]
    with pytest.raises(UserError, match="no chat template"):
        loaded.encode_chat([{"role": "user", "content": "hello"}])


def test_a_loaded_tokenizer_never_adds_a_beginning_of_text(llama_directory: Path) -> None:
    loaded = SLMTokenizer.from_pretrained(llama_directory)
    bos = loaded.special_tokens["<|begin_of_text|>"]
    library = Tokenizer.from_file(str(llama_directory / "tokenizer.json"))
    assert library.encode("the cat").ids[0] == bos
    assert loaded.encode("the cat") == library.encode("the cat").ids[1:]
    assert bos not in loaded.encode("the cat", allow_special=True)


def test_the_end_of_a_turn_is_found_in_others_vocabularies(llama_directory: Path, gemma_directory: Path) -> None:
    for directory, end_of_turn, end_of_text in (
        (llama_directory, "<|eot_id|>", "<|end_of_text|>"),
        (gemma_directory, "<end_of_turn>", "<eos>"),
    ):
        loaded = SLMTokenizer.from_pretrained(directory)
        assert loaded.end_of_turn_id == loaded.special_tokens[end_of_turn]
        assert loaded.eos_token_id == loaded.special_tokens[end_of_text]
        assert loaded.stop_token_ids == {loaded.end_of_turn_id, loaded.eos_token_id}


def test_a_template_in_a_file_of_its_own_comes_first(gemma_directory: Path) -> None:
    assert "<start_of_turn>" in (SLMTokenizer.from_pretrained(gemma_directory).chat_template or "")


def test_of_several_templates_the_default_is_taken(llama_directory: Path) -> None:
    edit_config(
        llama_directory,
        chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    )
    assert SLMTokenizer.from_pretrained(llama_directory).chat_template == "yes"


def test_tokens_that_only_the_config_calls_special_are_special(gpt2_directory: Path) -> None:
    path = gpt2_directory / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.add_tokens(["<|user|>", "<|stop|>"])
    library.save(str(path))
    edit_config(gpt2_directory, eos_token="<|stop|>", additional_special_tokens=["<|user|>"])
    loaded = SLMTokenizer.from_pretrained(gpt2_directory)
    assert loaded.eos_token_id == loaded.special_tokens["<|stop|>"] == len(loaded) - 1
    assert len(loaded.encode("<|user|><|stop|>")) > 2
    assert len(loaded.encode("<|user|><|stop|>", allow_special=True)) == 2


def test_added_tokens_are_decoded_as_they_are_spelled(gpt2_directory: Path) -> None:
    # In GPT-2's alphabet `č` stands for a carriage return, and the library decodes an added `č` as one.
    path = gpt2_directory / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.add_tokens(["č"])
    library.save(str(path))
    loaded = SLMTokenizer.from_pretrained(gpt2_directory)
    assert loaded.encode("a č") == library.encode("a č").ids
    assert library.decode(library.encode("a č").ids) != "a č"
    assert loaded.decode(loaded.encode("a č")) == "a č"


def test_a_special_token_that_swallows_white_space_does_so_here(gpt2_directory: Path) -> None:
    path = gpt2_directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1] |= {"lstrip": True, "rstrip": True}
    path.write_text(json.dumps(content))
    library = Tokenizer.from_file(str(path))
    text = "the cat  <|endoftext|> \n sat <|endoftext|><|endoftext|> "
    ids = SLMTokenizer.from_pretrained(gpt2_directory).encode(text, allow_special=True)
    assert ids == library.encode(text).ids
    assert len(ids) < len(library.encode(text.replace("<|endoftext|>", "")).ids) + 3


def test_a_length_limit_in_the_file_cuts_no_text(gpt2_directory: Path) -> None:
    path = gpt2_directory / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(path))
    loaded = SLMTokenizer.from_pretrained(gpt2_directory)
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]
    assert [ids.tolist() for ids in loaded.encode_batch(["é"])] == [loaded.encode("é")]
    assert len(loaded.encode("é")) <= 2


def test_a_vocabulary_that_is_not_byte_level_decodes_by_its_own_rules(sentencepiece_directory: Path) -> None:
    loaded = SLMTokenizer.from_pretrained(sentencepiece_directory)
    ids = loaded.encode("the cat é")
    assert loaded.token_bytes(ids[0]) == b" the"
    assert loaded.decode(ids) == "the cat é"
    assert b"".join(map(loaded.token_bytes, ids)) == " the cat é".encode()
    assert loaded.token_bytes(loaded.encode_bytes(b"\xff")[0]) == b"\xff"
    assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == "the cat é"


def test_a_byte_that_a_vocabulary_cannot_hold_is_named(gpt2_directory: Path) -> None:
    path = gpt2_directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = None  # no longer byte-level, and no byte tokens either
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no token for the byte 0xFF"):
        SLMTokenizer.from_pretrained(gpt2_directory).encode_bytes(b"a\xff")


def test_fingerprints_tell_apart_how_text_is_split(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), library.pre_tokenizer])
    library.save(str(tmp_path / "tokenizer.json"))
    assert SLMTokenizer.from_pretrained(tmp_path).fingerprint != tokenizer.fingerprint


def test_a_loaded_tokenizer_is_not_trained(gpt2_directory: Path) -> None:
    with pytest.raises(UserError, match="train a new one"):
        SLMTokenizer.from_pretrained(gpt2_directory).train(TEXTS)


def test_a_compressed_tokenizer_is_the_same_and_named_where_it_is_damaged(gpt2_directory: Path) -> None:
    plain, packed = gpt2_directory / "tokenizer.json", gpt2_directory / "tokenizer.json.gz"
    expected = SLMTokenizer.from_pretrained(gpt2_directory).fingerprint
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert SLMTokenizer.from_pretrained(gpt2_directory).fingerprint == expected
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"tokenizer\.json\.gz: cannot be read"):
        SLMTokenizer.from_pretrained(gpt2_directory)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such directory; expected what"):
        SLMTokenizer.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", [b"", b"{", b'{"model": 3}', b"\xff\xfe"])
def test_a_damaged_tokenizer_is_named(gpt2_directory: Path, damage: bytes) -> None:
    (gpt2_directory / "tokenizer.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"gpt2/tokenizer.json: .*save or download it again") as raised:
        SLMTokenizer.from_pretrained(gpt2_directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [b"", b"[1]", b"\xff", b'{"added_tokens_decoder": {"0": {"special": true}}}'])
def test_a_damaged_config_is_named(gpt2_directory: Path, damage: bytes) -> None:
    (gpt2_directory / "tokenizer_config.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"gpt2/tokenizer_config.json: .*save or download it again") as raised:
        SLMTokenizer.from_pretrained(gpt2_directory)
    assert "\n" not in str(raised.value)


def test_a_config_of_another_tokenizer_is_refused(gpt2_directory: Path) -> None:
    edit_config(gpt2_directory, eos_token="<|other|>")
    with pytest.raises(UserError, match=r"no end-of-text token that tokenizer.json has .*<\|other\|>"):
        SLMTokenizer.from_pretrained(gpt2_directory)


def test_a_tokenizer_without_an_end_of_text_is_refused(gpt2_directory: Path) -> None:
    path = gpt2_directory / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|something|>"))
    with pytest.raises(UserError, match="name one as eos_token in its tokenizer_config.json"):
        SLMTokenizer.from_pretrained(gpt2_directory)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
