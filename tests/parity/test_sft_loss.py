"""The loss of packed conversations is that of `transformers` for the same rows and the same labels."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from slmkit.data.batch import Batch
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.stream import ChatRows, Stream
from slmkit.model.config import SLMConfig
from slmkit.model.files.directory import save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.objective import next_token

transformers = pytest.importorskip("transformers")

LENGTH, TEMPLATES = 96, {"llama": "llama3", "gpt2": "chatml", "gemma3_text": "gemma", "qwen3": "chatml"}


def talk(chance: random.Random) -> list[dict[str, object]]:
    words = ["cat", "sea", "12", "sang", "é", "the"]
    messages: list[dict[str, object]] = []
    for _ in range(chance.randint(1, 2)):
        said = [" ".join(chance.choices(words, k=chance.randint(1, 5))) for _ in range(2)]
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said)]
    messages[1]["weight"] = chance.choice([0, 1, None])
    return messages


def theirs_shifted(labels: torch.Tensor) -> torch.Tensor:
    """transformers has the label of a position at the position itself."""
    assert (labels[:, -1] == IGNORED).all()
    return torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, :-1]], dim=1)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("separate", [False, True])
def test_packed_conversations_have_the_loss_of_transformers(family: str, separate: bool, tmp_path: Path) -> None:
    chance = random.Random(family)
    tokenizer = SLMTokenizer(260).extended(chat_template=TEMPLATES[family])
    shards = prepare_chat([talk(chance) for _ in range(40)], tokenizer, tmp_path / "shards")
    batch = Stream(ChatRows(shards, LENGTH), 6, seed=1, separate=separate).batch(0)
    config = SLMConfig(
        model_type=family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, eos_token_id=0,
        **({"sliding_window": 16} if family == "gemma3_text" else {}),
    )  # fmt: skip
    decoder = build_decoder(config, seed=1).eval()
    save_decoder(decoder, config, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        ours = next_token(decoder, batch).total.item() / next_token.weight(batch)
        theirs = (_each_alone if separate else _whole_rows)(model, batch)
    learned = batch.labels[:, :-1] != IGNORED
    assert torch.equal(batch.labels[:, :-1][learned], batch.ids[:, 1:][learned])
    assert batch.weight > 20
    assert (batch.labels != IGNORED).float().mean() < 0.6
    assert ours == pytest.approx(theirs, abs=1e-4)


def _whole_rows(model: torch.nn.Module, batch: Batch) -> float:
    return model(input_ids=batch.ids, labels=theirs_shifted(batch.labels)).loss.item()


def _each_alone(model: torch.nn.Module, batch: Batch) -> float:
    """Every conversation of the rows as a batch of its own."""
    assert batch.documents is not None
    nats, count = 0.0, 0
    for ids, labels, documents in zip(batch.ids, batch.labels, batch.documents):
        for number in np.unique(documents.numpy()):
            here = documents == number
            learned = int((labels[here] != IGNORED).sum())
            if learned:
                alone = model(input_ids=ids[here][None], labels=theirs_shifted(labels[here][None]))
                nats, count = nats + alone.loss.item() * learned, count + learned
    assert count == batch.weight
    return nats / count
