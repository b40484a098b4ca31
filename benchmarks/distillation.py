"""A student with a teacher against the same student without: loss at the same steps, and what a step costs.

python -m benchmarks.distillation                                # the built-in stories
python -m benchmarks.distillation --text wikitext-2=FILE         # a text of your own besides
python -m benchmarks.distillation --smoke                        # everything once, in a minute; nothing is written

Loss: a teacher is trained on a text, longer than the student and wider. Students of three seeds learn the same batches,
once from the labels alone and once from teacher and labels; the validation loss is the labels' cross-entropy for both.
The learning rate is the best of two *without* a teacher, alpha and temperature are the best of a few with one, all in
runs of their own (seed 100), by the validation loss.

Cost: one step of a small student whose teacher is many times as large, in a process each: without a teacher, with the
teacher in memory, and with its 64 likeliest tokens from disk. Memory is the largest that the process held, less what it
held before the models were built; both models have random weights, since no figure depends on them.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.runs import First, Quiet
from slmkit.data.prepare.corpus import Corpus, DataSettings, TokenizerSettings, build_corpus
from slmkit.data.rows.datasets import TextDataset
from slmkit.data.rows.teacher_cache import (
    CacheHeader,
    learned_starts,
    read_header,
    with_cached_logits,
    write_cache,
)
from slmkit.data.stream import DocumentRows, PretrainRows, Rows, Stream
from slmkit.device import Device, find_device, keep_freed_memory, peak_memory, reset_peak_memory, resident_memory
from slmkit.evaluation import validation_loss
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.fit import make_plan
from slmkit.training.logging.metrics_log import environment
from slmkit.training.loop import State, train, train_step
from slmkit.training.objective import Objective, next_token
from slmkit.training.objectives.distillation import (
    CachedTeacher,
    Distill,
    DistillationLoss,
    OnlineTeacher,
    frozen,
    in_compute_type,
)
from slmkit.training.optimizers.choose import make_optimizers
from slmkit.training.recipe.recipe import TrainSettings
from slmkit.workflows.distill import top_k_records

LENGTH, VOCABULARY, TOKENS_PER_STEP, VALIDATION_ROWS = 128, 2_048, 2_048, 64
STUDENT = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2}
RATES = (0.02, 0.04)  # Muon's; AdamW's for the rest is the one below
REST_RATE = 4e-3
MIXTURES = ((0.5, 3.0), (0.5, 1.0), (0.1, 1.0), (0.1, 2.0))  # alpha and temperature
RESULTS = Path(__file__).parent / "results" / "distillation.json"
COST_STUDENT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2}
COST_TEACHER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    documents: int = 2_000
    teacher_steps: int = 500
    student_steps: int = 100
    seeds: int = 3
    cost_steps: int = 7


SMOKE = Size(documents=100, teacher_steps=6, student_steps=3, seeds=1, cost_steps=2)


# -- loss at the same steps -------------------------------------------------------------------------------------------


def trained(
    corpus: Corpus, shape: dict, steps: int, seed: int, rate: float, objective: Objective = next_token
) -> tuple[Decoder, float]:
    """A model trained from fresh weights, and its validation loss at the end."""
    device = find_device("cpu")
    settings = TrainSettings(
        sequence_length=LENGTH,
        tokens_per_step=TOKENS_PER_STEP,
        max_steps=steps,
        optimizer="muon",
        muon_learning_rate=rate,
        learning_rate=REST_RATE,
    )
    config = SLMConfig(
        vocab_size=len(corpus.tokenizer),
        eos_token_id=corpus.tokenizer.eos_token_id,
        max_position_embeddings=LENGTH,
        **shape,
    )
    rows, model = PretrainRows(corpus.train[0], LENGTH), build_decoder(config, seed)
    plan = make_plan(settings, rows.rows_in_epoch, LENGTH, device)
    state = State(model, make_optimizers(model, settings, device), seed=seed)
    train(state, objective, Stream(rows, settings.rows_per_step(LENGTH), seed), plan)
    validation = First(DocumentRows(corpus.validation, LENGTH), VALIDATION_ROWS)
    return model, validation_loss(model, validation, device).loss


def with_and_without(source: str, size: Size) -> dict[str, object]:
    """Everything about one text."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataSettings(source=source, documents=size.documents, validation_documents=200)
        corpus = build_corpus("text", data, TokenizerSettings(vocab_size=VOCABULARY), 0, Path(folder), None, Quiet())
        steps = size.student_steps
        model, teachers_loss = trained(corpus, TEACHER, size.teacher_steps, 7, RATES[0])
        say(source, "teacher", teachers_loss)
        teacher = OnlineTeacher(frozen(in_compute_type(model, find_device("cpu")), find_device("cpu")), VOCABULARY)
        by_rate = {rate: trained(corpus, STUDENT, steps, 100, rate)[1] for rate in RATES}
        rate = min(by_rate, key=by_rate.__getitem__)
        say(source, "rates without a teacher", by_rate)
        by_mixture = {
            mixture: trained(corpus, STUDENT, steps, 100, rate, Distill(DistillationLoss(*mixture), teacher))[1]
            for mixture in MIXTURES
        }
        alpha, temperature = mixture = min(by_mixture, key=by_mixture.__getitem__)
        say(source, "alpha and temperature", by_mixture)
        losses: dict[str, list[float]] = {"without": [], "with": []}
        for seed in range(size.seeds):
            learning = {"without": next_token, "with": Distill(DistillationLoss(*mixture), teacher)}
            for name, objective in learning.items():
                losses[name].append(trained(corpus, STUDENT, steps, seed, rate, objective)[1])
            say(source, f"seed {seed}", {name: found[-1] for name, found in losses.items()})
        return {
            "training_tokens": corpus.training_tokens,
            "teacher": {"steps": size.teacher_steps, "validation_loss": round(teachers_loss, 4)},
            "student_steps": steps,
            "tried": {
                "muon_learning_rate": {str(rate): round(loss, 4) for rate, loss in by_rate.items()},
                "alpha, temperature": {str(each): round(loss, 4) for each, loss in by_mixture.items()},
            },
            "taken": {"muon_learning_rate": rate, "alpha": alpha, "temperature": temperature},
            "validation_loss": {name: spread(found) for name, found in losses.items()},
            "gain": spread([a - b for a, b in zip(losses["without"], losses["with"])]),
        }


def spread(values: list[float]) -> dict[str, object]:
    """Mean and standard deviation, and what they are of."""
    return {
        "mean": round(statistics.mean(values), 4),
        "standard_deviation": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "each": [round(value, 4) for value in values],
    }


def say(*what: object) -> None:
    print(*what, flush=True)


# -- what a step costs ------------------------------------------------------------------------------------------------


def cost_rows() -> tuple[dict[str, Rows], SLMTokenizer]:
    """Sixteen rows a step of made-up text: which words they are of makes no difference."""
    tokenizer = SLMTokenizer(260)
    texts = [f"Once there was a number {number}, and it went for a walk. " * 40 for number in range(64)]
    return {"text": TextDataset(texts, tokenizer, max_length=LENGTH)}, tokenizer


def cost_model(shape: dict) -> Decoder:
    return build_decoder(SLMConfig(vocab_size=16_384, max_position_embeddings=LENGTH, **shape), 0)


def cost_teacher(device: Device) -> OnlineTeacher:
    return OnlineTeacher(frozen(in_compute_type(cost_model(COST_TEACHER), device), device), 16_384)


def make_cost_cache(folder: Path, rows_needed: int) -> None:
    device, (rows, _) = find_device("cpu"), cost_rows()
    header = CacheHeader("", "", "", "text", False, LENGTH, rows_needed, 16_384, 64, 1.0)
    starts = learned_starts(rows.values())[: rows_needed + 1]
    records_of = functools.partial(top_k_records, cost_teacher(device), header, device)
    write_cache(folder, header, rows, starts, records_of, 16, lambda *done: None)


def cost(how: str, folder: Path, steps: int) -> dict[str, float]:
    """Median seconds of a step, and memory in bytes, in this process."""
    device, (rows, _) = find_device("cpu"), cost_rows()
    keep_freed_memory()
    before = resident_memory()
    reset_peak_memory(device)
    loss, objective = DistillationLoss(0.5, 1.0), next_token
    if how == "online":
        objective = Distill(loss, cost_teacher(device))
    elif how == "offline":
        objective, rows = Distill(loss, CachedTeacher(16_384)), with_cached_logits(rows, folder, read_header(folder))
    settings = TrainSettings(sequence_length=LENGTH, tokens_per_step=TOKENS_PER_STEP, max_steps=steps)
    model = cost_model(COST_STUDENT)
    plan = make_plan(settings, None, LENGTH, device)
    state, source = State(model, make_optimizers(model, settings, device)), rows["text"]
    count, seconds = settings.rows_per_step(LENGTH), []
    for step in range(steps):
        started = time.process_time()
        batch = FirstRows(source).batch(step * count, count)
        train_step(state, objective, batch, plan)
        seconds.append(time.process_time() - started)
    return {"seconds": statistics.median(seconds[1:]), "memory_bytes": peak_memory(device) - before}


class FirstRows(Stream):
    """Rows in their order."""

    def __init__(self, source: Rows) -> None:
        super().__init__(source, 1)

    def batch(self, start: int, count: int):  # type: ignore[override]
        from slmkit.data.batch import Batch, stacked

        indices = list(range(start, start + count))
        return Batch.of(*self.source.rows(indices), None, stacked([self.source.extra(index) for index in indices]))


def costs(size: Size) -> dict[str, object]:
    """Each in a process of its own, which starts from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        make_cost_cache(Path(folder), size.cost_steps * TOKENS_PER_STEP // LENGTH)
        found = {}
        for how in ("none", "online", "offline"):
            command = [sys.executable, __file__, "--cost", how, folder, str(size.cost_steps)]
            command += ["--threads", str(torch.get_num_threads())]
            found[how] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            say("cost", how, found[how])
    parameters = {name: sum(p.numel() for p in cost_model(shape).parameters())
                  for name, shape in (("student", COST_STUDENT), ("teacher", COST_TEACHER))}  # fmt: skip
    return {"parameters": parameters, "steps": size.cost_steps, "tokens_per_step": TOKENS_PER_STEP, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--only-text", action="store_true", help="leave the built-in stories out")
    parser.add_argument("--only-cost", action="store_true", help="leave the losses out")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cost", nargs=3, metavar=("HOW", "FOLDER", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cost:
        how, folder, steps = arguments.cost
        print(json.dumps(cost(how, Path(folder), int(steps))))
        return
    keep_freed_memory()
    size = SMOKE if arguments.smoke else Size()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() and not arguments.smoke else {"texts": {}}
    content |= {"date": datetime.date.today().isoformat(), "environment": environment()}
    content["cost"] = costs(size)
    texts = {} if arguments.only_text else {"stories": "stories"}
    texts |= dict(text.split("=", 1) for text in arguments.text)
    for name, source in {} if arguments.only_cost else texts.items():
        content["texts"][name] = {"threads": arguments.threads} | with_and_without(source, size)
        say(name, content["texts"][name]["validation_loss"], content["texts"][name]["gain"])
        if not arguments.smoke:
            RESULTS.write_text(json.dumps(content) + "\n")
    if not arguments.smoke:
        RESULTS.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
