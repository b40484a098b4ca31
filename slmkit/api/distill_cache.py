"""`slm distill-cache`: a teacher asked once about all rows of a recipe, so that training needs none in memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from slmkit.api.distill import lessons_of, load_teacher, settings_of, teacher_fingerprint, with_the_teachers_tokenizer
from slmkit.api.reporter import Reporter
from slmkit.api.vocabulary import tokenizer_of_base
from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.corpus import build_corpus
from slmkit.data.feed import stored_rows
from slmkit.data.packing import IGNORED
from slmkit.data.stream import Rows
from slmkit.data.teacher_cache import Answer, Lessons, learned_starts, write_cache
from slmkit.device import Device, find_device
from slmkit.find import find_model_directory
from slmkit.model import SLMConfig
from slmkit.model.adapter_directory import config_directory
from slmkit.training.chunked_head import in_chunks
from slmkit.training.recipe import Recipe
from slmkit.training.teachers import OnlineTeacher, likeliest


def cache_teacher(recipe: Recipe, reporter: Reporter) -> Lessons:
    """Fill the recipe's `distillation.cache` with what its teacher says of every learned position of its rows.

    One that was stopped goes on. Raises `UserError` for whatever in the recipe or its data is wrong.
    """
    settings = settings_of(recipe)
    if settings.teacher is None or settings.cache is None:
        raise UserError(
            "distill-cache needs distillation.teacher, a model, and distillation.cache, the folder to write"
        )
    recipe, folder = with_the_teachers_tokenizer(recipe), Path(settings.cache)
    device = find_device(recipe.train.device, recipe.train.precision)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    tokenizer = tokenizer_of_base(recipe, base) if base else None
    directory = find_model_directory(settings.teacher)
    corpus = build_corpus(
        recipe.reads, recipe.data, recipe.tokenizer, recipe.seed, folder / "data", tokenizer, reporter
    )
    config = SLMConfig.from_pretrained(config_directory(base)) if base else recipe.model.build_config()
    length = recipe.train.sequence_length or config.max_position_embeddings
    rows = stored_rows(recipe.reads, recipe.data, corpus, length)
    lessons = lessons_of(recipe, corpus, rows, length, teacher_fingerprint(directory))
    starts = learned_starts(rows.values())
    size = int(starts[-1]) * lessons.record.itemsize
    reporter.say(f"{folder}: {lessons.rows:,} rows, {int(starts[-1]):,} learned positions, {size / 2**20:,.0f} MiB")
    teacher = OnlineTeacher(load_teacher(settings.teacher, corpus.tokenizer, length, device), lessons.tokens)
    answer = answer_of(teacher, rows, lessons, device)
    at_once = recipe.train.rows_per_micro_batch(length)
    write_cache(folder, lessons, starts, answer, at_once, reporter.counter("teacher", lessons.rows))
    corpus.tokenizer.save_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "data")
    return lessons


def answer_of(teacher: OnlineTeacher, rows: Mapping[str, Rows], lessons: Lessons, device: Device) -> Answer:
    """The records of any rows, numbered over all sources in their order."""
    sources = list(rows.values())
    firsts = np.cumsum([0, *(source.rows_in_epoch for source in sources)])

    def answer(numbers: list[int]) -> list[np.ndarray]:
        places = [(int(i := np.searchsorted(firsts, n, side="right") - 1), n - int(firsts[i])) for n in numbers]
        ids, labels = (np.stack(column) for column in zip(*(sources[i].row(index) for i, index in places)))
        documents = np.stack([sources[i].documents(index) for i, index in places]) if lessons.separate else None
        batch = Batch.of(ids, labels, documents).to(device.torch_device)
        learned = batch.labels != IGNORED
        with device.autocast(), torch.no_grad():
            records = records_of(teacher, teacher.states(batch)[learned], lessons)
        return np.split(records, np.cumsum(learned.sum(1).cpu().numpy())[:-1])

    return answer


def records_of(teacher: OnlineTeacher, states: torch.Tensor, lessons: Lessons) -> np.ndarray:
    """What is stored of hidden states [positions, width]: records [positions]."""
    records = np.empty(len(states), lessons.record)
    for place in in_chunks(len(states), teacher.decoder.architecture.vocab_size, states.device):
        logits = teacher.decoder.logits(states[place]).float()[:, : lessons.tokens]  # [chunk, tokens]
        found = likeliest(logits, lessons.k, lessons.temperature)
        for name, tensor in zip(("logits", "ids", "rest"), found):
            records[name][place] = tensor.cpu().numpy()
    return records
