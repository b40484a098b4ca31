"""How new tokens should begin: as the mean of what spelled them, the mean of all tokens, or at random.

python benchmarks/growth.py

One small base model on the built-in stories; then, with the same batches for each way of beginning, it learns
conversations in Llama 3's template (four new tokens) and reads on with a token for each of a hundred words. What counts
is nats a token of held-out conversations, bits a byte of held-out stories (token counts differ), and how much the plain
stories' loss rises through growth alone: what new tokens take of the probability before they are trained.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from slmkit.data import stories
from slmkit.data.prepare.conversations import prepare_chat
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.shards.reader import TokenShards
from slmkit.data.stream import ChatRows, DocumentRows, PretrainRows, Stream
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder, grow_vocabulary
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import Every, Report, State, train
from slmkit.training.objective import next_token
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings

LENGTH, VOCABULARY, TOKENS_PER_STEP = 256, 512, 2_048
SHAPE = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
LOOKS = (5, 20, 60)  # steps; and before the first
WORDS = 100
RESULTS = Path(__file__).parent / "results" / "growth.json"
Rows = ChatRows | DocumentRows | PretrainRows


def mean_of_all(weight: torch.Tensor, new: list[int], seed: int) -> None:
    weight[new] = weight[: min(new)].mean(0)


def at_random(weight: torch.Tensor, new: list[int], seed: int) -> None:
    """As fresh weights are drawn."""
    weight[new] = 0.02 * torch.randn(len(new), weight.size(1), generator=torch.Generator().manual_seed(seed))


# What is done to the new rows after `grow_vocabulary`; tied embeddings, so that one matrix has them.
WAYS: dict[str, Callable[[torch.Tensor, list[int], int], None]] = {
    "mean of its pieces": lambda weight, new, seed: None,
    "mean of all tokens": mean_of_all,
    "random": at_random,
}


def learn(model: Decoder, rows: Rows, steps: int, seed: int, rate: float, look: Callable[[int], None]) -> None:
    device = find_device("cpu")
    settings = TrainSettings(
        sequence_length=LENGTH, tokens_per_step=TOKENS_PER_STEP, max_steps=steps, learning_rate=rate
    )
    plan = make_plan(settings, rows.rows_in_epoch, LENGTH, device)
    state = State(model, make_optimizers(model, settings, device), seed=seed)

    def due(state: State, report: Report) -> None:
        if state.step in LOOKS:
            look(state.step)

    train(state, next_token, Stream(rows, settings.rows_per_step(LENGTH), seed), plan, [Every(1, due)])


def rare_words(tokenizer: SLMTokenizer, texts: list[str]) -> list[str]:
    """The words whose pieces are most of the text."""
    counts = Counter(word for text in texts for word in re.findall("[a-z]{4,}", text))
    saved = {word: count * (len(tokenizer.encode(word)) - 1) for word, count in counts.items()}
    return sorted(saved, key=lambda word: (-saved[word], word))[:WORDS]


class Study:
    """The base model, and its two ways on."""

    def __init__(self, folder: Path, documents: int, steps: int) -> None:
        self.folder = folder
        texts = [story.text for story in stories.tell_many(0, documents)]
        held_out = [story.text for story in stories.tell_many(1_000_003, 150)]
        self.base_tokenizer = SLMTokenizer(VOCABULARY)
        self.base_tokenizer.train(texts[:2000])
        plain = prepare_text(texts, self.base_tokenizer, folder / "plain")
        self.plain_validation = prepare_text(held_out, self.base_tokenizer, folder / "plain-validation")
        self.config = SLMConfig(vocab_size=len(self.base_tokenizer), eos_token_id=0, **SHAPE)
        self.base = build_decoder(self.config, 0)
        learn(self.base, PretrainRows(plain, LENGTH), steps, 0, 3e-3, lambda step: None)
        talks = [stories.conversation(seed, row) for seed in (0, 1_000_003) for row in range(documents)]
        chatting = self.base_tokenizer.extended(chat_template="llama3")
        with_words = self.base_tokenizer.extended(added_tokens=rare_words(self.base_tokenizer, texts))
        self.tasks = {
            "conversations": (
                chatting,
                ChatRows(prepare_chat(talks[:documents], chatting, folder / "chat"), LENGTH),
                prepare_chat(talks[documents : documents + 150], chatting, folder / "chat-validation"),
            ),
            "words": (
                with_words,
                PretrainRows(prepare_text(texts, with_words, folder / "words"), LENGTH),
                prepare_text(held_out, with_words, folder / "words-validation"),
            ),
        }

    def measure(self, task: str, way: str, seed: int) -> dict[str, object]:
        tokenizer, rows, validation = self.tasks[task]
        pieces = tokenizer.pieces_of_new_tokens(self.base_tokenizer)
        model, _ = grow_vocabulary(self.base, self.config, pieces)
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        with torch.no_grad():
            WAYS[way](model.embedding.weight, sorted(pieces), seed)
        curve: dict[int, float] = {}

        def look(step: int) -> None:
            curve[step] = self.figure(task, model, validation)

        risen = self.loss(model, DocumentRows(self.plain_validation, LENGTH)) - self.plain_loss
        look(0)
        learn(model, rows, max(LOOKS), seed, 1e-3, look)
        return {"task": task, "way": way, "seed": seed, "new_tokens": len(pieces), "risen": risen, "curve": curve}

    @property
    def plain_loss(self) -> float:
        return self.loss(self.base, DocumentRows(self.plain_validation, LENGTH))

    def figure(self, task: str, model: Decoder, validation: TokenShards) -> float:
        if task == "conversations":
            return self.loss(model, ChatRows(validation, LENGTH))
        report = validation_loss(model, DocumentRows(validation, LENGTH), find_device("cpu", "float32"))
        return report.bits_per_byte(validation.header.text_bytes)

    def loss(self, model: Decoder, rows: Rows) -> float:
        return validation_loss(model, rows, find_device("cpu", "float32")).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=300, help="of the base model")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), options.documents, options.steps)
        print(f"base: {study.plain_loss:.4f} nats a token of stories", flush=True)
        runs = []
        for seed in range(options.seeds):
            for task in study.tasks:
                for way in WAYS:
                    runs.append(study.measure(task, way, seed))
                    print(json.dumps(runs[-1]), flush=True)
        base_loss = study.plain_loss
    content = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": vars(options) | {"length": LENGTH, "tokens_per_step": TOKENS_PER_STEP, **SHAPE},
        "base_loss": base_loss,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
