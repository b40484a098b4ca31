"""`tokenizer.path: gpt2` is GPT-2's vocabulary by tiktoken, without a network where its cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.tokenizer import SLMTokenizer

DATA = next(
    (p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), Path("/nowhere")
)
CACHE = DATA / "gpt2" / "tiktoken-cache"
TEXTS = [
    "Once upon a time there was a pumpkin.", "it's  42!\n\n\tdef f(x):\r\n", "猫が座った 🐈 CAFÉ cafe\u0301 ﬁ ½",
    "<|endoftext|>",    " " * 33 + "x", "'ll 've don'T", "\x00\x1f\x7f", "",
]  # fmt: skip


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> SLMTokenizer:
    if not CACHE.is_dir():
        pytest.skip("tiktoken's cache of GPT-2's vocabulary is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return SLMTokenizer.from_pretrained("gpt2")


def test_ids_are_tiktokens_and_stay_so_on_disk(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    import tiktoken

    theirs = tiktoken.get_encoding("gpt2")
    story = DATA / "tinystories" / "stories.txt"
    texts = [*TEXTS, *(story.read_text(encoding="utf-8")[:50_000].split("\n\n") if story.is_file() else [])]
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, SLMTokenizer.from_pretrained(tmp_path)):
        assert len(one) == theirs.n_vocab == 50_257
        assert one.eos_token_id == theirs.eot_token == 50_256
        for text in texts:
            ids = theirs.encode_ordinary(text)
            assert one.encode(text) == ids
            assert one.decode(ids) == text
        assert [one.token_bytes(index) for index in range(50_256)] == [
            theirs.decode_single_token_bytes(index) for index in range(50_256)
        ]


def test_transformers_reads_what_is_saved(tokenizer: SLMTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        if "<|" not in text:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == 50_256


def test_without_cache_and_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.registry

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(
        UserError, match="tokenizer gpt2: tiktoken cannot load its vocabulary .* set TIKTOKEN_CACHE_DIR"
    ):
        SLMTokenizer.from_pretrained("gpt2")


def test_a_directory_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SLMTokenizer(300).save_pretrained("gpt2")
    assert len(SLMTokenizer.from_pretrained("gpt2")) == 260
