"""The loss that is reported is the loss that there is, and on the built-in corpus it stands beside the perfect one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.stories import tell_many
from slmkit.data.stream import DocumentRows, Rows
from slmkit.device import find_device
from slmkit.evaluation import LossReport, validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.estimate.memory import AllocationTracker

CPU = find_device("cpu", "float32")


def decoder(vocab_size: int = 300) -> Decoder:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build_decoder(SLMConfig(vocab_size=vocab_size, max_position_embeddings=512, initializer_range=0.2, **shape))


def test_it_is_the_sum_over_documents_each_read_alone_behind_the_end_of_text(tmp_path: Path) -> None:
    """Independent of packing: every document by itself, with plain cross-entropy."""
    tokenizer, model = SLMTokenizer(300), decoder()
    texts = ["A fox and a hen.", "An owl and a kite.", "One more of them."]
    rows = DocumentRows(prepare_text(texts, tokenizer, tmp_path / "shards"), length=20)
    assert rows.rows_in_epoch == 3  # too long to share a row of 20: alone is alone
    nats, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id])
        with torch.no_grad():
            logits = model.eval().logits(model(ids[None, :-1]))[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
    for rows_per_batch in (1, 2, 8):
        report = validation_loss(model, rows, CPU, rows_per_batch)
        assert report.tokens == tokens
        assert report.nats == pytest.approx(nats, rel=1e-5)


class Random(Rows):
    """Rows of tokens that mean nothing."""

    rows_in_epoch = 0

    def __init__(self, rows: int, length: int, vocab_size: int) -> None:
        self.rows_in_epoch = rows
        self.ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids[index, :-1], self.ids[index, 1:]

    def documents(self, index: int) -> np.ndarray:
        return np.zeros_like(self.ids[index, :-1])


def test_the_logits_of_a_batch_are_never_there_all_at_once() -> None:
    vocab_size = 20_000
    model, rows = decoder(vocab_size), Random(8, 400, vocab_size)
    with AllocationTracker() as tracker:
        report = validation_loss(model, rows, CPU)
    ids = torch.from_numpy(rows.ids)
    with torch.no_grad():
        logits = model.eval().logits(model(ids[:, :-1])).flatten(0, 1)  # [positions, vocab_size]
        nats = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
    assert (report.tokens, report.nats) == (8 * 400, pytest.approx(nats, rel=1e-6))
    assert tracker.peak < logits.nbytes / 2


def test_perplexity_and_bits_per_byte_follow_from_it() -> None:
    report = LossReport(nats=math.log(2) * 80, tokens=40)
    assert report.loss == pytest.approx(2 * math.log(2))
    assert report.perplexity == pytest.approx(4)
    assert report.bits_per_byte(text_bytes=160) == pytest.approx(0.5)


def test_dropout_is_off_while_it_is_measured_and_on_again_after() -> None:
    class OneRow(Rows):
        rows_in_epoch = 1

        def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return np.arange(8), np.arange(1, 9)

    config = SLMConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout=0.5,
    )  # fmt: skip
    model = build_decoder(config).train()
    assert validation_loss(model, OneRow(), CPU) == validation_loss(model, OneRow(), CPU)
    assert model.training


def test_no_model_beats_the_perfect_one_and_a_fresh_one_is_far_above_it(tmp_path: Path) -> None:
    tokenizer = SLMTokenizer(600)
    stories = list(tell_many(5, 40))
    tokenizer.train([story.text for story in stories])
    tokens = sum(len(tokenizer.encode(story.text)) + 1 for story in stories)
    perfect = -sum(story.log_probability for story in stories) / tokens
    shards = prepare_text([story.text for story in stories], tokenizer, tmp_path / "s", perfect_loss=perfect)
    report = validation_loss(decoder(600), DocumentRows(shards, 512), CPU)
    assert report.tokens == tokens
    assert shards.header.perfect_loss == perfect
    assert 0.2 < perfect < 1 < report.loss
