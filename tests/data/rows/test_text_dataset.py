"""The data set of a five-line script."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from slmkit.config import UserError
from slmkit.data.packing import IGNORED
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.stream import Stream
from tests.data.byte_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


class Letters:
    """The least a tokenizer can be."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def __len__(self) -> int:
        return 128


def test_a_short_text_is_padded_and_padding_is_not_learned():
    item = TextDataset(["ab"], TOKENIZER, max_length=5)[0]
    assert item["input_ids"].tolist() == [97, 98, EOS, PAD, PAD]
    assert item["labels"].tolist() == [97, 98, EOS, IGNORED, IGNORED]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64


def test_a_long_text_comes_in_overlapping_windows_that_teach_each_token_once():
    data = TextDataset(["abcdefg"], TOKENIZER, max_length=4, stride=2)
    assert [data[i]["input_ids"].tolist() for i in range(len(data))] == [
        [*b"abcd"],
        [*b"cdef"],
        [*b"efg", EOS],
    ]
    assert [data[i]["labels"].tolist() for i in range(len(data))] == [
        [*b"abcd"],
        [IGNORED, IGNORED, *b"ef"],
        [IGNORED, IGNORED, *b"g", EOS],
    ]


@pytest.mark.parametrize("stride", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("length", range(1, 15))
def test_every_token_but_the_first_is_learned_exactly_once(length: int, stride: int | None):
    text = "abcdefghijklmnop"[:length]
    data = TextDataset([text, "xy"], TOKENIZER, max_length=4, stride=stride)
    learned = []
    for i in range(data.rows_in_epoch):
        ids, labels = data.row(i)
        assert (labels != IGNORED).any()
        for id, label in zip(ids.tolist(), labels.tolist()):
            if label != IGNORED:
                learned.append((id, label))
    whole = [*text.encode(), EOS]
    assert sorted(learned) == sorted([*pairwise(whole), (120, 121), (121, EOS)])

    # The same of items, as a model that shifts the labels itself sees them, where windows overlap.
    if data.stride < 4:
        shifted = [label for i in range(len(data)) for label in data[i]["labels"][1:].tolist() if label != IGNORED]
        assert sorted(shifted) == sorted([*whole[1:], 121, EOS])


def test_any_tokenizer_will_do():
    item = TextDataset(["abc"], Letters(), max_length=5)[0]
    assert item["input_ids"].tolist() == [97, 98, 99, 0, 0]
    assert item["labels"].tolist() == [97, 98, 99, IGNORED, IGNORED]


def test_it_feeds_a_stream_and_a_torch_loader():
    data = TextDataset(["abcdefgh", "ij"], TOKENIZER, max_length=4)
    batch = Stream(data, rows_per_step=3, seed=0).batch(0)
    assert batch.ids.shape == batch.labels.shape == (3, 4)
    assert batch.weight == 8 + 2
    (whole,) = DataLoader(data, batch_size=4)
    assert whole["input_ids"].shape == whole["labels"].shape == (4, 4)


def test_lengths_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="stride from 1 to max_length"):
        TextDataset(["text"], TOKENIZER, max_length=4, stride=5)
    with pytest.raises(UserError, match="max_length of at least 2"):
        TextDataset(["text"], TOKENIZER, max_length=1)
    for texts in ([], [""], ["a"]):
        with pytest.raises(UserError, match="nothing to learn"):
            TextDataset(texts, Letters(), max_length=4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({"text": ["abc"]}, TOKENIZER, 4), "expected a list of texts, found dict"),
        ((TOKENIZER, ["abc"], 4), "expected a list of texts"),
        ((["abc"], "runs/base", 4), "expected a tokenizer"),
        ((["abc"], TOKENIZER, "16"), "max_length '16'"),
        ((["abc"], TOKENIZER, 16.5), "max_length 16.5"),
        ((["abc"], TOKENIZER, 16, "4"), "stride '4'"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextDataset(*arguments)


def test_importing_the_package_does_not_wait_for_torch():
    code = "import sys, slmkit.data.shards.reader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
