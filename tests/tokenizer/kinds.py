"""Tokenizers of every kind that models come with: made here with the library, and real ones where they are at hand."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.real_data import real_data
from tests.tokenizer.conftest import TEXTS

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# What every kind is given: edges, white space, other scripts, and text that spells special tokens.
PROSE = [
    "Once upon a time there was a cat.",
    "  two spaces, and \n\na blank line\n",
    "The cat sat; it's 12345! def f(x):\n\treturn x",
    "Les élèves étaient là. 猫が座った 🐈",
    "",
    " ",
    "x",
]
Kind = tuple[Tokenizer, dict[str, Any]]


def _pieces(extra: list[str] = ()) -> list[str]:  # type: ignore[assignment]
    """SentencePiece-like pieces of the texts: words with their space in front, syllables and characters."""
    words = sorted({word for text in TEXTS for word in text.split()})
    characters = sorted({*"".join(TEXTS), *"".join(PROSE), *"<>/[]INSTsu|im_endra:"} - {" ", "\n", "\t", "\r"})
    return [*dict.fromkeys([*extra, "▁", "▁▁", *(f"▁{word}" for word in words[:60]), *words[:60], *characters])]


def special_bytes(make: Callable[[], Kind]) -> Callable[[], Kind]:
    """As `BpeTrainer(special_tokens=[*BYTES])` leaves it: the bytes are declared as special."""

    def made() -> Kind:
        tokenizer, config = make()
        tokenizer.add_special_tokens(BYTES)
        return tokenizer, config

    return made


def special_padding() -> Kind:
    """A byte-level vocabulary that pads with the token of a character, as CLIP's does."""
    tokenizer, config = byte_level()()
    tokenizer.normalizer = normalizers.NFC()  # which the fast encoder does not do
    tokenizer.add_special_tokens(["!"])
    return tokenizer, config | {"pad_token": "!"}


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's: trained merges over `▁`, unknown characters as bytes. Its edges are the caller's."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        [f" {text}" for text in TEXTS], trainers.BpeTrainer(vocab_size=300, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *BYTES, *(token for token in learned["vocab"] if token not in "\n\t\r")]
    kept = {*tokens}
    merges = [(a, b) for a, b in learned["merges"] if {a, b, a + b} <= kept]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def prepend() -> Kind:
    tokenizer = with_bos(sentencepiece_bpe())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer, CONFIG


def metaspace(scheme: str, split: bool = False) -> Callable[[], Kind]:
    def make() -> Kind:
        tokenizer = with_bos(sentencepiece_bpe())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
        if scheme == "never":
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        return tokenizer, CONFIG | {"add_bos_token": True, "add_eos_token": True}  # which transformers overrules

    return make


def llama_class(legacy: bool) -> Callable[[], Kind]:
    """`tokenizer.json` says one thing and the class that its config names another: the class is obeyed."""
    return lambda: (prepend()[0], CONFIG | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy})


def gemma_class() -> Kind:
    """A tokenizer.json that strips a space when it decodes, which the class does not."""
    return sentencepiece_bpe(), CONFIG | {"tokenizer_class": "GemmaTokenizer", "mask_token": "<pad>"}


def gemma_like() -> Kind:
    tokenizer = with_bos(sentencepiece_bpe())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, CONFIG


def unigram(scheme: str, byte_fallback: bool = True) -> Callable[[], Kind]:
    """Its control tokens are pieces of the model too, of score 0, as converted SentencePiece models have them."""

    def make() -> Kind:
        pieces = _pieces()
        scores = [(token, 0.0) for token in SPECIAL]
        scores += [(byte, -20.0) for byte in BYTES] if byte_fallback else []
        scores += [(piece, -10.0 - 3.0 / len(piece)) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, 0, byte_fallback))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme=scheme)
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
        return tokenizer, CONFIG

    return make


def wordpiece() -> Kind:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({*"".join(PROSE).lower(), *"".join(TEXTS).lower(), *"<>/[]|"} - {*" \n\t\r"})
    words = sorted({word.lower() for text in TEXTS for word in text.split() if word.isalpha()})
    tokens = [*dict.fromkeys([*special, *words, *letters, *(f"##{letter}" for letter in letters)])]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return tokenizer, config | {"unk_token": "[UNK]", "pad_token": "[PAD]"}


def word_level() -> Kind:
    """Split at white space alone, so that a special token that a text spells is a word of the vocabulary."""
    words = sorted({word for text in [*TEXTS, *PROSE] for word in text.split()})
    tokens = [*dict.fromkeys([*SPECIAL, *words])]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer, CONFIG


def byte_level(**options: bool) -> Callable[[], Kind]:
    def make() -> Kind:
        tokenizer = Tokenizer(models.BPE())
        add_prefix_space = options.get("add_prefix_space", False)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        )
        strips = options.get("strips", False)
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, lstrip=strips, rstrip=strips, normalized=strips) for token in SPECIAL]
        )
        if options.get("words"):
            tokenizer.add_tokens(["the cat", AddedToken("sat", single_word=True), AddedToken("sea", lstrip=True)])
        if options.get("trims"):
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return with_bos(tokenizer) if options.get("bos") else tokenizer, CONFIG

    return make


def llama3_like() -> Kind:
    tokenizer, config = byte_level()()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return with_bos(tokenizer), config


MADE: dict[str, Callable[[], Kind]] = {
    "prepend": prepend,
    "metaspace-first": metaspace("first"),
    "metaspace-always": metaspace("always"),
    "metaspace-never": metaspace("never"),
    "metaspace-split": metaspace("first", split=True),
    "llama-class": llama_class(legacy=False),
    "llama-class-legacy": llama_class(legacy=True),
    "gemma-class": gemma_class,
    "gemma-like": gemma_like,
    "unigram-first": unigram("first"),
    "unigram-always": unigram("always"),
    "metaspace-special-bytes": special_bytes(metaspace("first")),
    "unigram-special-bytes": special_bytes(unigram("first")),
    "unigram-unknown": unigram("first", byte_fallback=False),
    "wordpiece": wordpiece,
    "word-level": word_level,
    "byte-level": byte_level(),
    "byte-level-bos": byte_level(bos=True),
    "byte-level-prefix": byte_level(add_prefix_space=True),
    "byte-level-strips": byte_level(strips=True),
    "byte-level-trims": byte_level(trims=True),
    "byte-level-words": byte_level(words=True),
    "llama3-like": llama3_like,
}
REAL = ["gpt-neo", "minimind", "torchtune-tiny", "torchtune-tiktoken", "llama2", "tinystories-sp8192"]


def directory_of(kind: str, folder: Path) -> Path:
    """A tokenizer's directory, made or copied below `folder`. Skips the test where a real one is absent."""
    folder /= kind
    folder.mkdir(parents=True)
    if kind in MADE:
        tokenizer, config = MADE[kind]()
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        config = _real(kind, folder)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _real(kind: str, folder: Path) -> dict[str, Any]:
    """Write `tokenizer.json` of real data; the config that goes with it."""
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    if kind == "gpt-neo":
        source = real_data("tokenizers/gpt-neo/tokenizer.json.gz")
        (folder / "tokenizer.json").write_bytes(gzip.decompress(source.read_bytes()))
        return plain
    if kind == "torchtune-tiny":
        shutil.copy(real_data("tokenizers/torchtune-tiny/tokenizer.json"), folder)
        return plain
    if kind == "minimind":
        for path in real_data("tokenizers/minimind").iterdir():
            shutil.copy(path, folder)
        return {}
    if kind == "torchtune-tiktoken":
        from transformers.convert_slow_tokenizer import TikTokenConverter

        path = real_data("tokenizers/torchtune-tiny/tiktoken_small.model")
        made = TikTokenConverter(str(path), extra_special_tokens=["<|endoftext|>"]).converted()
        made.save(str(folder / "tokenizer.json"))
        return plain
    with_bos(real_sentencepiece(real_data(f"tokenizers/{kind}/tokenizer.model"))).save(str(folder / "tokenizer.json"))
    return CONFIG | {"tokenizer_class": "LlamaTokenizer", "pad_token": "</s>"}


def real_sentencepiece(path: Path) -> Tokenizer:
    """A SentencePiece BPE model as published `tokenizer.json`s have it: `Prepend ▁`, merges in order of score."""
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.utils import sentencepiece_model_pb2_new as proto

    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    merges = generate_merges(vocabulary, dict(scores))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[:3]])
    return tokenizer
