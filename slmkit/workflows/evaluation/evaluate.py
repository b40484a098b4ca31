"""Loss of a model on a text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.data.prepare.conversations import encoded_rows, write_conversations
from slmkit.data.prepare.open_sources import items_of
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.sources import open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.data.stream import ChatRows, DocumentRows
from slmkit.device import find_device
from slmkit.evaluation import LossReport, validation_loss
from slmkit.evaluation.results import TaskResult
from slmkit.find import find_model_directory, find_tokenizer_directory
from slmkit.tokenizer import SLMTokenizer

LENGTH = 2048  # tokens of a row, for models with a longer context


@dataclass(frozen=True)
class TextFigures:
    """Loss figures of a model on a text. `left_out` has a line for each reason for which rows were skipped."""

    documents: int  # number evaluated
    report: LossReport
    bits_per_byte: float  # for conversations: over the text of the answers only
    length: int  # tokens of a row
    left_out: list[str]


def evaluate(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    text: SourceSettings | None = None,
    task_data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat_template: str = "auto",
    window: int | None = None,
    stride: int | None = None,
    max_new_tokens: int | None = None,
    samples: int = 1,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Callable[[str, float | None], None] = lambda figures, share: None,
) -> list[TaskResult]:
    """Results of a run, model directory, adapter or quantized model on a text and on tasks."""
    raise UserError("evaluate: still being built")


def evaluate_text(
    model: str | Path,
    source: SourceSettings,
    *,
    chat: bool = False,
    length: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> TextFigures:
    """Loss of a model directory, adapter or run on the data of `source`, every token predicted once.

    Documents are packed into rows of `length` tokens, as in the validation of a training run; longer ones are cut. With
    `chat` the source has conversations, and the assistant's turns are predicted. `progress` is called with rows done
    and rows in total. Raises `UserError` for unreadable data, and for a length beyond the model's context.
    """
    where = find_device(device, precision)
    tokenizer = SLMTokenizer.from_pretrained(find_tokenizer_directory(model))
    decoder, config = load_model(find_model_directory(model), where.torch_device)
    length = length or min(config.max_position_embeddings, LENGTH)
    if length > config.max_position_embeddings:
        raise UserError(f"{model}: it reads at most {config.max_position_embeddings:,} tokens at once: lower --length")
    opened = open_source(source)
    with tempfile.TemporaryDirectory(prefix="slmkit-eval-") as folder:
        try:
            if chat:
                talks = encoded_rows(opened, "conversations", tokenizer, length)
                shards = write_conversations(talks, tokenizer, f"{folder}/shards")
            else:
                shards = prepare_text(items_of(opened, "text"), tokenizer, f"{folder}/shards")
        except UserError as error:
            problem, of_a_recipe, _ = str(error).partition(": objective: ")
            if not of_a_recipe:
                raise
            raise UserError(
                f"{problem}; eval reads text, or conversations with --chat; pairs are not evaluated"
            ) from None
        rows = ChatRows(shards, length) if chat else DocumentRows(shards, length)
        report = validation_loss(decoder, rows, where, progress=progress)
        left_out = opened.report()
        if isinstance(rows, ChatRows):
            documents, text_bytes = len(rows.starts) - rows.untrained, _learned_bytes(rows, tokenizer)
        else:
            documents, text_bytes = shards.header.documents, shards.header.text_bytes
    return TextFigures(documents, report, report.bits_per_byte(text_bytes), length, left_out)


def _learned_bytes(rows: ChatRows, tokenizer: SLMTokenizer) -> int:
    """Bytes (UTF-8) of the learned text of conversations, without special tokens."""
    spans = [(start + 1, stop) for start, stop in zip(rows.starts.tolist(), rows.stops.tolist())]
    learned = [rows.shards.tokens_in(*span)[rows.shards.trained_in(*span)].tolist() for span in spans]
    return sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in learned)
