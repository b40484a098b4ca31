"""Text as shards of every kind of tokenizer: the ids of `transformers`, the text again, and nothing lost unsaid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slmkit.config import UserError
from slmkit.data.prepare.conversations import ConversationEncoder, prepare_chat
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.shards.folder import document_ids, encode
from slmkit.data.sources import Document, Judged
from slmkit.data.sources.documents import PIECE, Pair, pieces
from slmkit.data.streaming import tokenized
from slmkit.tokenizer import SLMTokenizer
from tests.tokenizer.conftest import save_foreign
from tests.tokenizer.kinds import CONFIG, MADE, REAL, directory_of
from tests.tokenizer.test_kinds import TEMPLATES

transformers = pytest.importorskip("transformers")

TEXTS = ["The cat sat by the sea.", " Les élèves sang\n\nto the sea ", "x"]
LOSSY = ("wordpiece", "word-level", "unigram-unknown", "torchtune-tiny")


@pytest.mark.parametrize("kind", [kind for kind in (*MADE, *REAL) if kind not in LOSSY])
def test_shards_hold_the_ids_of_transformers_and_decode_to_the_text(kind: str, tmp_path: Path) -> None:
    directory = directory_of(kind, tmp_path)
    ours, theirs = SLMTokenizer.from_pretrained(directory), transformers.AutoTokenizer.from_pretrained(directory)
    documents = [Document(text) for text in TEXTS]
    expected = []
    for text in TEXTS:
        ids = theirs(text).input_ids
        expected += [*ids[: len(ids) - len(ours.ending)], ours.eos_token_id]
    assert encode(ours, documents).ids.tolist() == expected
    dataset = TextDataset(TEXTS, ours, max_length=256)
    assert [i for item in dataset for i in item["input_ids"][item["labels"] >= 0].tolist()] == expected
    assert tokenized(documents, ours)[0].tolist() == expected
    long = "The cat sat by the sea and sang. " * (2 * PIECE // 30)
    parts = list(pieces(long))
    assert [(part.begins, part.ends) for part in parts][:2] == [(True, False), (False, False)]
    ids = np.concatenate(document_ids(ours, parts)).tolist()
    whole = [*ours.beginning, *ours.encode(long)]
    assert ours.decode(ids) == ours.decode(whole)
    if "prepend" not in kind:  # a byte-level one sees where a word begins, SentencePiece's are cut before a space
        assert abs(len(ids) - len(whole)) <= 2 * len(parts)


def lossy(folder: Path, byte_level: bool) -> SLMTokenizer:
    """It knows the letters of English, and nothing else."""
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *"ĠĊ.abcdefghijklmnopqrstuvwxyzTC"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, []) if byte_level else models.WordLevel({**vocabulary, "cat": 99}, "<unk>")
    )
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Whitespace()
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else None
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    return SLMTokenizer.from_pretrained(save_foreign(folder, tokenizer, CONFIG))


@pytest.mark.parametrize("byte_level", [True, False])
def test_more_than_a_trace_of_lost_text_is_refused_with_its_share(tmp_path: Path, byte_level: bool) -> None:
    ours, good = lossy(tmp_path / "a", byte_level), "cat " * 2_000
    encode(ours, [Document(good)])
    encode(ours, [Document("猫")])  # one in eight thousand
    with pytest.raises(UserError, match=r"loses \d+\.\d% of the text .* have no token\): use one that is made"):
        encode(ours, [Document("猫が座った。42!" * 100)])
    again = lossy(tmp_path / "b", byte_level)
    again.chat_template = TEMPLATES["plain"]
    talk = [{"role": "user", "content": "猫" * 99}, {"role": "assistant", "content": "cat"}]
    with pytest.raises(UserError, match="of the text"):
        list(ConversationEncoder(again).encode_all([talk]))


def test_lost_text_of_pairs_and_judgements_is_refused_too(tmp_path: Path) -> None:
    ours = lossy(tmp_path, byte_level=True)
    ours.chat_template = TEMPLATES["plain"]
    asked = {"role": "user", "content": "cat"}
    good, bad = ([asked, {"role": "assistant", "content": said}] for said in ("猫" * 99, "cat"))
    with pytest.raises(UserError, match="of the text"):
        prepare_chat([Pair(good, bad, 1)], ours, tmp_path / "pairs")
    ours = lossy(tmp_path, byte_level=True)
    ours.chat_template = TEMPLATES["plain"]
    with pytest.raises(UserError, match="of the text"):
        prepare_chat([Judged(good, True)], ours, tmp_path / "judgements")


def test_a_vocabulary_with_every_byte_loses_nothing(tmp_path: Path) -> None:
    for kind in ("byte-level", "prepend", "unigram-first"):
        ours = SLMTokenizer.from_pretrained(directory_of(kind, tmp_path))
        document_ids(ours, [Document("猫が座った。42! \U0001f408" * 50)])
        ours.check_losses()
