"""Distillation runs: a loaded or cached teacher, and its objective."""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from slmkit.adapt.load import load_model
from slmkit.config import UserError
from slmkit.data.batch import Batch
from slmkit.data.make_batches import make_batches, stored_rows, stream_of
from slmkit.data.packing import IGNORED
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.rows.teacher_cache import (
    IDS,
    LOGITS,
    REST,
    CacheHeader,
    data_fingerprint,
    learned_starts,
    read_header,
    with_cached_logits,
    write_cache,
)
from slmkit.data.stream import Rows, Stream
from slmkit.data.streaming import StreamedBatches
from slmkit.device import Device, find_device
from slmkit.files import file_sha256
from slmkit.files.find import find_model_directory, find_tokenizer_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, base_of, is_adapter
from slmkit.model.files.directory import empty_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.compilation import compile_blocks, compile_pays
from slmkit.training.estimate.memory import MemoryProfile
from slmkit.training.losses import in_chunks
from slmkit.training.objectives.distillation import (
    CachedTeacher,
    Distill,
    DistillationLoss,
    OnlineTeacher,
    check_fit,
    frozen,
    in_compute_type,
    top_k,
)
from slmkit.training.recipe.objective_settings import DistillationSettings
from slmkit.training.recipe.recipe import Recipe
from slmkit.workflows.context import RecipeContext, Reporter
from slmkit.workflows.model import prepare_data


def distill_batches(m: RecipeContext) -> tuple[Stream | StreamedBatches, Distill]:
    """Batches of text or conversations, and the objective.

    Raises `UserError` if teacher and student do not fit together, or the cache is of other data or another teacher.
    """
    recipe, settings, tokens = m.recipe, _settings_of(m.recipe), len(m.corpus.tokenizer)
    if settings.cache:
        rows = _rows_from_cache(m, settings, Path(settings.cache))
        return stream_of(rows, recipe.data, m.length, m.rows_per_step, recipe.seed), _objective(settings, tokens, None)
    assert settings.teacher is not None
    _expect_another_model(recipe, settings)
    decoder = load_teacher(settings.teacher, m.corpus.tokenizer, m.length, m.device)
    if compile_pays(recipe.train.compile, m.device):
        compile_blocks(decoder)
    batches = make_batches(recipe.reads, recipe.data, m.corpus, m.length, m.rows_per_step, recipe.seed)
    return batches, _objective(settings, tokens, decoder)


def distill_memory(recipe: Recipe, model: Decoder, tokens: int, device: Device) -> MemoryProfile:
    """Memory profile with a teacher in memory, or with cached logits."""
    settings = _settings_of(recipe)
    k = min(settings.top_k, tokens)

    def objective(teacher: Decoder | None) -> Distill:
        return _objective(settings, tokens, teacher)

    def cached_logits(rows: int, length: int) -> dict[str, torch.Tensor]:
        logits = torch.zeros(rows, length, k, dtype=torch.float16)
        return {LOGITS: logits, IDS: logits.int(), REST: torch.full((rows, length), -0.7)}

    if settings.cache:
        return MemoryProfile(model, objective=objective, extra=cached_logits)
    assert settings.teacher is not None
    config = SLMConfig.from_pretrained(find_model_directory(settings.teacher))
    teacher = in_compute_type(empty_decoder(config), device).eval().requires_grad_(False)
    return MemoryProfile(model, frozen=teacher, objective=objective)


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
    theirs = SLMTokenizer.from_pretrained(directory)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"teacher {directory}: its tokenizer {theirs.fingerprint[:12]} ({len(theirs):,} tokens) is not that of the "
            f"student, {tokenizer.fingerprint[:12]} ({len(tokenizer):,}): the same ids mean different tokens"
        )
    decoder, _ = load_model(directory)
    check_fit(decoder, len(tokenizer), length, f"teacher {path}")
    return frozen(in_compute_type(decoder, device), device)


def teacher_fingerprint(directory: Path) -> str:
    """sha256 (hex) over a model's config and weights; for an adapter also over its base's."""
    files = [directory / name for name in ("config.json", ADAPTER_CONFIG)] + sorted(directory.glob("*.safetensors"))
    parts = [f"{path.name} {file_sha256(path)}" for path in files if path.is_file()]
    if is_adapter(directory):
        parts.append(teacher_fingerprint(base_of(directory)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _settings_of(recipe: Recipe) -> DistillationSettings:
    assert recipe.distillation is not None  # checked by the recipe
    return recipe.distillation


def _objective(settings: DistillationSettings, tokens: int, teacher: Decoder | None) -> Distill:
    """The objective with a teacher, or None for cached logits."""
    loss = DistillationLoss(settings.alpha, settings.temperature, settings.divergence)
    source = CachedTeacher(tokens) if teacher is None else OnlineTeacher(teacher, tokens)
    return Distill(loss, source, settings.hidden_weight)


def _expect_another_model(recipe: Recipe, settings: DistillationSettings) -> None:
    """Raises `UserError` if the teacher is the student, of which without labels nothing is learned."""
    if settings.alpha > 0 or recipe.model.path is None or settings.teacher is None:
        return
    student, teacher = find_model_directory(recipe.model.path), find_model_directory(settings.teacher)
    if teacher_fingerprint(student) == teacher_fingerprint(teacher):
        raise UserError(
            f"distillation.teacher {settings.teacher} is the model of model.path, and with alpha 0 nothing else is "
            "learned: name another teacher, or raise distillation.alpha"
        )


def _rows_from_cache(m: RecipeContext, settings: DistillationSettings, folder: Path) -> dict[str, Rows]:
    """The run's rows with their cached logits."""
    found, rows = read_header(folder), stored_rows(m.recipe.reads, m.recipe.data, m.corpus, m.length)
    teacher = teacher_fingerprint(find_model_directory(settings.teacher)) if settings.teacher else found.teacher
    difference = found.difference(_header_of(m.recipe, m.corpus, rows, m.length, teacher))
    if difference is not None:
        raise UserError(
            f"{folder}: made for other data or settings ({difference}): make it anew by `slm distill-cache`"
        )
    return with_cached_logits(rows, folder, found)


def _header_of(recipe: Recipe, corpus: Corpus, rows: dict[str, Rows], length: int, teacher: str) -> CacheHeader:
    """The header of this recipe's cache. `teacher` is the teacher's fingerprint."""
    settings, tokens = _settings_of(recipe), len(corpus.tokenizer)
    return CacheHeader(
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


# -- slm distill-cache ------------------------------------------------------------------------------------------------


def cache_teacher(recipe: Recipe, reporter: Reporter) -> CacheHeader:
    """Fill the recipe's `distillation.cache` with the teacher's top-k logits at every learned position of its rows.

    A partial cache is continued. Raises `UserError` for errors in the recipe or its data.
    """
    settings = recipe.distillation
    if settings is None or settings.teacher is None or settings.cache is None:
        raise UserError(
            "distill-cache needs a recipe of objective distill with distillation.teacher, a model, and "
            "distillation.cache, the folder to write"
        )
    recipe, folder = with_the_teachers_tokenizer(recipe), Path(settings.cache)
    device = find_device(recipe.train.device, recipe.train.precision)
    base = find_model_directory(recipe.model.path) if recipe.model.path else None
    corpus, _, length = prepare_data(recipe, folder / "data", base, reporter)
    rows = stored_rows(recipe.reads, recipe.data, corpus, length)
    header = _header_of(recipe, corpus, rows, length, teacher_fingerprint(find_model_directory(settings.teacher)))
    starts = learned_starts(rows.values())
    size = int(starts[-1]) * header.record.itemsize
    reporter.say(f"{folder}: {header.rows:,} rows, {int(starts[-1]):,} learned positions, {size / 2**20:,.0f} MiB")
    teacher = OnlineTeacher(load_teacher(settings.teacher, corpus.tokenizer, length, device), header.tokens)
    records_of = functools.partial(top_k_records, teacher, header, device)
    at_once = recipe.train.rows_per_micro_batch(length)
    write_cache(folder, header, rows, starts, records_of, at_once, reporter.counter("teacher", header.rows))
    corpus.tokenizer.save_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "data")
    return header


def top_k_records(teacher: OnlineTeacher, header: CacheHeader, device: Device, batch: Batch) -> np.ndarray:
    """Records [positions] of a batch's learned positions, row by row."""
    batch = batch.to(device.torch_device)
    with device.autocast(), torch.no_grad():
        states = teacher.states(batch)[batch.labels != IGNORED]  # [positions, width]
        records = np.empty(len(states), header.record)
        for chunk in in_chunks(len(states), teacher.decoder.architecture.vocab_size, states.device):
            logits = teacher.logits(states[chunk])[:, : header.tokens]  # [chunk, tokens]
            for name, found in zip(("logits", "ids", "rest"), top_k(logits, header.k, header.temperature)):
                records[name][chunk] = found.cpu().numpy()
    return records
