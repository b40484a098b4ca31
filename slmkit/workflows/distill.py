"""Distillation runs: a loaded or cached teacher, and its objective."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.make_batches import make_batches, stored_rows, stream_of
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.corpus import Corpus, build_corpus
from slmkit.data.rows.teacher_cache import (
    IDS,
    LOGITS,
    REST,
    Answer,
    Lessons,
    data_fingerprint,
    learned_starts,
    read_lessons,
    taught,
    write_cache,
)
from slmkit.data.stream import ChatRows, DocumentRows, Rows, Stream
from slmkit.data.streaming.batches import StreamedBatches
from slmkit.device import Device, find_device
from slmkit.find import find_model_directory, find_tokenizer_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, base_of, config_directory, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.checkpoints.checkpoint import file_sha256
from slmkit.training.compilation import compile_blocks, compile_pays
from slmkit.training.estimate.memory_profile import MemoryProfile
from slmkit.training.losses import in_chunks
from slmkit.training.objective import Objective
from slmkit.training.objectives.distill import Distill, DistillWithStates
from slmkit.training.objectives.distillation import DistillationLoss
from slmkit.training.objectives.teachers import (
    OnlineTeacher,
    StoredTeacher,
    check_fit,
    frozen,
    in_compute_type,
    likeliest,
)
from slmkit.training.recipe.objective_settings import DistillationSettings
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import ObjectiveParts, RecipeContext, Reporter
from slmkit.workflows.hooks import Sample, Validate
from slmkit.workflows.model import tokenizer_of_base


def distill_work(m: RecipeContext) -> ObjectiveParts:
    """Objective parts of distillation on text or conversations; validation is the labels' cross-entropy.

    Raises `UserError` if teacher and student do not fit together, or the cache is of other data or another teacher.
    """
    settings, talks = settings_of(m.recipe), m.recipe.reads == "conversations"
    batches, objective = _from_cache(m, Path(settings.cache)) if settings.cache else _from_teacher(m)
    rows: Rows = (ChatRows if talks else DocumentRows)(m.corpus.validation, m.length)
    return ObjectiveParts(
        batches=batches,
        objective=objective,
        validate=Validate(rows, m.device, batches.separate, m.group, m.text_bytes),
        sample=Sample(m.run.samples, m.recipe, m.corpus.tokenizer, talks, m.group),
        validation_tokens=rows.rows_in_epoch * m.length,
        report=batches.report,
    )


def distill_inventory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """Memory profile with a teacher in memory, or with cached logits."""
    settings = settings_of(recipe)
    objective = _objective_of(settings, tokens)
    if settings.cache:
        return MemoryProfile(model, objective=objective, extra=_stored_of(min(settings.top_k, tokens)))
    return MemoryProfile(model, beside=teacher_like(settings, device, empty_decoder), objective=objective)


def teacher_like(settings: DistillationSettings, device: Device, make: Callable[[SLMConfig], Decoder]) -> Decoder:
    """A model made by `make` from the teacher's config, in the type that a run uses."""
    assert settings.teacher is not None
    config = SLMConfig.from_pretrained(config_directory(find_model_directory(settings.teacher)))
    return in_compute_type(make(config), device).eval().requires_grad_(False)


def _stored_of(k: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Extra tensors shaped as a cache's: equal logits for the top k, and half the probability for other tokens."""

    def extra(rows: int, length: int) -> dict[str, torch.Tensor]:
        logits = torch.zeros(rows, length, k, dtype=torch.float16)
        return {LOGITS: logits, IDS: logits.int(), REST: torch.full((rows, length), -0.7)}

    return extra


def settings_of(recipe: Recipe) -> DistillationSettings:
    if recipe.distillation is None:
        raise UserError("the recipe has no section `distillation`: set its objective to distill and name a teacher")
    return recipe.distillation


def with_the_teachers_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe with the teacher's tokenizer if the student is new and the recipe names none; else unchanged."""
    settings = recipe.distillation
    if settings is None or recipe.model.path is not None or recipe.tokenizer.path is not None:
        return recipe
    teacher = settings.teacher or Path(settings.cache or "") / "tokenizer"
    tokenizer = recipe.tokenizer.model_copy(update={"path": str(find_tokenizer_directory(teacher))})
    return recipe.model_copy(update={"tokenizer": tokenizer})


def load_teacher(path: str, tokenizer: SLMTokenizer, length: int, device: Device) -> Decoder:
    """The frozen model of a model or run directory. Raises `UserError` if it does not fit tokenizer or row length."""
    directory = find_model_directory(path)
    check_same_tokenizer(directory, tokenizer)
    decoder, _ = load_model(directory)
    check_fit(decoder, len(tokenizer), length, f"teacher {path}")
    return frozen(in_compute_type(decoder, device), device)


def check_same_tokenizer(directory: Path, tokenizer: SLMTokenizer) -> None:
    """Raises `UserError` if the teacher's tokenizer differs from the student's."""
    theirs = SLMTokenizer.from_pretrained(directory)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"teacher {directory}: its tokenizer {theirs.fingerprint[:12]} ({len(theirs):,} tokens) is not that of the "
            f"student, {tokenizer.fingerprint[:12]} ({len(tokenizer):,}): the same ids mean different tokens"
        )


def teacher_fingerprint(directory: Path) -> str:
    """sha256 (hex) over a model's config and weights; for an adapter also over its base's."""
    files = [directory / name for name in ("config.json", ADAPTER_CONFIG)] + sorted(directory.glob("*.safetensors"))
    parts = [f"{path.name} {file_sha256(path)}" for path in files if path.is_file()]
    if is_adapter(directory):
        parts.append(teacher_fingerprint(base_of(directory)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def lessons_of(recipe: Recipe, corpus: Corpus, rows: dict[str, Rows], length: int, teacher: str) -> Lessons:
    """Description of the cache for this recipe. `teacher` is the teacher's fingerprint."""
    settings, tokens = settings_of(recipe), len(corpus.tokenizer)
    return Lessons(
        teacher=teacher,
        tokenizer=corpus.tokenizer.fingerprint,
        data=data_fingerprint(corpus.train),
        reads=recipe.reads,
        separate=recipe.data.separate_documents,
        length=length,
        rows=sum(source.rows_in_epoch for source in rows.values()),
        tokens=tokens,
        k=min(settings.top_k, tokens),
        temperature=settings.temperature,
    )


def _expect_another_model(m: RecipeContext, settings: DistillationSettings) -> None:
    """If the teacher is the student: raises `UserError` if no labels are used, else prints a note."""
    if m.recipe.model.path is None or settings.teacher is None:
        return
    student, teacher = find_model_directory(m.recipe.model.path), find_model_directory(settings.teacher)
    if not student.samefile(teacher) and teacher_fingerprint(student) != teacher_fingerprint(teacher):
        return
    if settings.alpha == 0:
        raise UserError(
            f"distillation.teacher {settings.teacher} is the model of model.path, and with alpha 0 nothing else is "
            "learned: name another teacher, or raise distillation.alpha"
        )
    m.reporter.say(f"teacher: {settings.teacher} is the student's own model: at first only the labels teach anything")


def _objective_of(settings: DistillationSettings, tokens: int) -> Callable[[Decoder | None], Objective]:
    """Function from a teacher, or None for cached logits, to the objective."""
    loss = DistillationLoss(settings.alpha, settings.temperature, settings.divergence)

    def objective(decoder: Decoder | None) -> Objective:
        if decoder is None:
            return Distill(loss, StoredTeacher(tokens))
        teacher = OnlineTeacher(decoder, tokens)
        plain = Distill(loss, teacher)
        return DistillWithStates(plain, teacher, settings.hidden_weight) if settings.hidden_weight else plain

    return objective


def _from_teacher(m: RecipeContext) -> tuple[Stream | StreamedBatches, Objective]:
    recipe, settings = m.recipe, settings_of(m.recipe)
    assert settings.teacher is not None
    _expect_another_model(m, settings)
    decoder = load_teacher(settings.teacher, m.corpus.tokenizer, m.length, m.device)
    if compile_pays(recipe.train.compile, m.device):
        compile_blocks(decoder)
    batches = make_batches(recipe.reads, recipe.data, m.corpus, m.length, m.rows_per_step, recipe.seed)
    return batches, _objective_of(settings, len(m.corpus.tokenizer))(decoder)


def _from_cache(m: RecipeContext, folder: Path) -> tuple[Stream | StreamedBatches, Objective]:
    recipe, settings = m.recipe, settings_of(m.recipe)
    found = read_lessons(folder)
    rows = stored_rows(recipe.reads, recipe.data, m.corpus, m.length)
    teacher = teacher_fingerprint(find_model_directory(settings.teacher)) if settings.teacher else found.teacher
    wanted = lessons_of(recipe, m.corpus, rows, m.length, teacher)
    difference = found.difference(wanted)
    if difference is not None:
        raise UserError(
            f"{folder}: made for other data or settings ({difference}): make it anew by `slm distill-cache`"
        )
    taught_rows = taught(rows, folder, found)
    batches = stream_of(taught_rows, recipe.data, m.length, m.rows_per_step, recipe.seed)
    return batches, _objective_of(settings, found.tokens)(None)


def cache_teacher(recipe: Recipe, reporter: Reporter) -> Lessons:
    """Fill the recipe's `distillation.cache` with the teacher's top-k logits at every learned position of its rows.

    A partial cache is continued. Raises `UserError` for errors in the recipe or its data.
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
    """Function from row numbers, counted over all sources in order, to their records."""
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
    """Cache records [positions] of the teacher's hidden states [positions, width]."""
    records = np.empty(len(states), lessons.record)
    for place in in_chunks(len(states), teacher.decoder.architecture.vocab_size, states.device):
        logits = teacher.decoder.logits(states[place]).float()[:, : lessons.tokens]  # [chunk, tokens]
        found = likeliest(logits, lessons.k, lessons.temperature)
        for name, tensor in zip(("logits", "ids", "rest"), found):
            records[name][place] = tensor.cpu().numpy()
    return records
