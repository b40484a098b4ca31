"""A model measured on texts, conversations and tasks."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import quantized_modules
from slmkit.config import UserError
from slmkit.data.prepare.conversations import encoded_rows
from slmkit.data.sources import STORY_WORLDS, open_source
from slmkit.data.sources.settings import SourceSettings
from slmkit.device import find_device
from slmkit.evaluation.perplexity import chat_result, text_result, window_and_stride
from slmkit.evaluation.results import TaskResult
from slmkit.files.find import find_model_directory, find_tokenizer_directory, run_of
from slmkit.generation.ensemble import LanguageModel
from slmkit.model.config import SLMConfig
from slmkit.model.files.adapter_directory import config_directory, is_adapter
from slmkit.model.files.directory import quantization_of
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.recipe.recipe import load_recipe
from slmkit.workflows.evaluation.cache import code_content, digest_of, model_content, stored
from slmkit.workflows.evaluation.text import read_text

STORED_ANSWERS = {"oracle": True, "wrong": False}  # "models" that no directory has the name of
SEED = 1234  # of the choice of shots, as lm-eval's default, and of the held-out stories

Progress = Callable[[str, float | None], None]  # what is done, and which share of it


def evaluate(
    model: str | Path,
    *,
    tasks: Sequence[str] = (),
    text: Sequence[SourceSettings] = (),
    conversations: bool = False,
    task_data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat_template: str = "auto",
    window: int | None = None,
    stride: int | None = None,
    joined: bool = False,
    max_new_tokens: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    unsafe_code: bool = False,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress = lambda what, share: None,
) -> list[TaskResult]:
    """Results of a run, model directory, adapter, quantized model or model of the hub.

    `text`: sources of text, or with `conversations` of conversations, whose assistant's turns are predicted; `window`,
    `stride` and `joined` as in `text_result`. `tasks`: names of `load_tasks` or `STORY_WORLDS`. `task_data`: a
    folder with the tasks' files. `limit`: the first documents of each. `shots`: examples in a prompt, instead of the
    task's own number. `chat_template`: `chat`, `none`, or `auto`: `chat` for a model that learned conversations
    (`uses_chat`). `samples` answers to each problem of code tasks, drawn at `temperature`; `unsafe_code`: their
    programs are run without a sandbox if there is none. `precision` `auto` is float32 on a CPU, so that figures agree
    between machines, and bfloat16 on accelerators that have it.

    The model `oracle` gives the right answers of exact-match and code tasks, `wrong` wrong ones, if no directory has
    that name.

    With `cache`, results of the same model, data and recipe are not computed again; then no weights are loaded. Raises
    `UserError` for what cannot be loaded or evaluated.
    """
    asked: dict[str, Any] = {"data": task_data, "shots": shots, "samples": samples, "temperature": temperature}
    asked["unsafe_code"] = unsafe_code
    if is_stored(model):
        asked["progress"] = counted(progress, str(model), "programs")
        return on_stored_answers(str(model), tasks, asked, chat_template == "chat", limit)
    one = _Evaluated(model, device, precision, cache, limit, progress)
    asked["chat"] = bool(tasks) and uses_chat(model, chat_template)
    # Loaded before anything is computed, so that a wrong name is found at once.
    loaded = {name: one.load(name, asked) for name in tasks if name not in STORY_WORLDS}
    results: list[TaskResult] = []
    for source in text:
        window, stride = one.geometry(window, stride)
        if conversations:
            results += one.on_conversations(source, window, stride)
        else:
            results += one.on_text(source, window, stride, joined)
    for name in tasks:
        if name in STORY_WORLDS:
            results += one.on_stories(name, asked["chat"])
        else:
            results += one.on_task(name, loaded[name], asked, max_new_tokens)
    return results


def is_stored(model: str | Path) -> bool:
    """Whether a model's name means right or wrong answers from the data of the tasks."""
    return str(model) in STORED_ANSWERS and not Path(model).exists()


def on_stored_answers(
    model: str, tasks: Sequence[str], asked: Mapping[str, Any], chat: bool, limit: int | None
) -> list[TaskResult]:
    """Results of the right answers of exact-match and code tasks (`oracle`), or of wrong ones (`wrong`).

    Raises `UserError` for other tasks.
    """
    if not tasks or not set(STORY_WORLDS).isdisjoint(tasks):
        raise UserError(f"{model}: stored answers are for exact-match and code tasks, such as --tasks gsm8k")
    from slmkit.evaluation.tasks import load_tasks, run_tasks

    loaded = load_tasks(tasks, chat=chat, **asked)
    from slmkit.evaluation.self_test import StoredAnswers  # imports lm-eval; `load_tasks` says if it is missing

    answers = StoredAnswers(loaded, right=STORED_ANSWERS[model])
    return run_tasks(answers, loaded, limit=limit, seed=SEED, self_test=False)


def uses_chat(model: str | Path, chat_template: str) -> bool:
    """Whether prompts for a model are conversations. Raises `UserError` for another word, and without a template.

    By `auto`, if it learned conversations: its run says so; of another directory, an adapter, or a model whose
    configuration does not exclude that it ends its turns.
    """
    if chat_template not in ("auto", "chat", "none"):
        raise UserError(f"template {chat_template!r}: expected auto, chat or none")
    tokenizer = SLMTokenizer.from_pretrained(find_tokenizer_directory(model))
    directory, run = find_model_directory(model), run_of(model)
    if tokenizer.chat_template is None or chat_template == "none":
        if chat_template == "chat":
            raise UserError(f"{model}: its tokenizer has no chat template: use --template none")
        return False
    if chat_template == "chat" or (is_adapter(directory) and run is None):
        return True
    if run is not None:
        return load_recipe(run / "recipe.yaml").reads != "text"
    ends = SLMConfig.from_pretrained(directory).for_generation()["eos_token_id"]
    return ends is None or tokenizer.end_of_turn_id in np.atleast_1d(ends)


class _Evaluated:
    """A model that is loaded when its first answer is needed."""

    def __init__(
        self, model: str | Path, device: str, precision: str, cache: bool, limit: int | None, progress: Progress
    ) -> None:
        self.model, self.use_cache, self.limit, self.progress = model, cache, limit, progress
        self.directory = find_model_directory(model)
        self.tokenizer = SLMTokenizer.from_pretrained(find_tokenizer_directory(model))
        self.config = SLMConfig.from_pretrained(config_directory(self.directory))
        self.tokenizer.use_generation_config(self.config.for_generation())
        self.where = find_device(device, precision)
        is_exact = precision == "auto" and self.where.torch_device.type == "cpu"
        self.dtype = torch.float32 if is_exact else self.where.compute_dtype
        is_quantized = quantization_of(config_directory(self.directory)) is not None
        dtype = "of the quantized weights" if is_quantized else str(self.dtype).removeprefix("torch.")
        self.common = {"precision": dtype, "slmkit": version("slmkit")}

    @cached_property
    def decoder(self) -> LanguageModel:
        decoder, _ = load_model(self.directory, self.where.torch_device)
        return decoder if quantized_modules(decoder) else decoder.to(self.dtype)

    @cached_property
    def content(self) -> dict[str, Any]:
        """What every result depends on."""
        libraries = {name: _version(name) for name in ("torch", "tokenizers", "lm_eval")}
        where = self.where.torch_device.type
        return {**self.common, "code": code_content(), "device": where, **libraries, **model_content(self.model)}

    def kept(
        self, key: Mapping[str, Any], compute: Callable[[], list[TaskResult]], notes: Sequence[str] = ()
    ) -> list[TaskResult]:
        """The results of `compute`, or what is stored of them, with the limit, the notes, precision and version."""

        def noted() -> list[TaskResult]:
            more = {"limit": self.limit, **({"notes": [*notes]} if notes else {}), **self.common}
            return [replace(one, recipe={**one.recipe, **more}) for one in compute()]

        if not self.use_cache:
            return noted()
        return stored({**self.content, **key, "limit": self.limit, "notes": [*notes]}, noted)

    def on_text(self, source: SourceSettings, window: int, stride: int, joined: bool) -> list[TaskResult]:
        found = read_text(source, self.limit)
        key = {"text": found.name, "window": window, "stride": stride, "joined": joined}
        texts = digest_of([found.documents, found.originals, found.left_out])
        return self.kept({**key, "documents": texts}, lambda: [text_result(
            self.decoder, self.tokenizer, found.documents, name=found.name, originals=found.originals,
            left_out=found.left_out, window=window, stride=stride, joined=joined,
            progress=self.counter(found.name, "windows"),
        )], found.notes)  # fmt: skip

    def on_conversations(self, source: SourceSettings, window: int, stride: int) -> list[TaskResult]:
        opened = open_source(source)
        try:
            talks = list(itertools.islice(encoded_rows(opened, "conversations", self.tokenizer), self.limit))
        except UserError as error:
            problem, of_a_recipe, _ = str(error).partition(": objective: ")
            more = "; eval reads text, or conversations with --chat; pairs are not evaluated"
            raise UserError(problem + more * bool(of_a_recipe)) from None
        rows = [row for talk in talks for row in talk.rows]
        key = {"conversations": source.label, "window": window, "stride": stride}
        return self.kept({**key, "rows": digest_of(row.to_lists() for row in rows)}, lambda: [chat_result(
            self.decoder, self.tokenizer, rows, name=source.label, window=window, stride=stride,
            progress=self.counter(source.label, "windows"),
        )], opened.report())  # fmt: skip

    def on_stories(self, source: str, chat: bool) -> list[TaskResult]:
        from slmkit.evaluation.stories import COUNT, story_report

        def show(what: str, done: int, of: int) -> None:
            self.counter(what, "")(done, of)

        count = self.limit or COUNT
        return self.kept(
            {source: count, "chat": chat},
            lambda: story_report(self.decoder, self.tokenizer, count=count, chat=chat, progress=show, source=source),
        )

    def load(self, name: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        from slmkit.evaluation.tasks import load_tasks

        self.progress(f"{name}: reading the task", None)
        return load_tasks([name], progress=self.counter(name, "programs"), **asked)

    def on_task(
        self, name: str, loaded: Mapping[str, Any], asked: Mapping[str, Any], max_new_tokens: int | None
    ) -> list[TaskResult]:
        from slmkit.evaluation.harness_task import quiet
        from slmkit.evaluation.tasks import run_tasks

        def compute() -> list[TaskResult]:
            from slmkit.evaluation.harness import EngineLM

            lm = EngineLM(self.decoder, self.tokenizer, max_new_tokens=max_new_tokens)
            found = run_tasks(lm, loaded, limit=self.limit, seed=SEED, progress=self.counter(name, "requests"))
            beginning = self.tokenizer.decode(lm.prefix_token_id)
            return [replace(one, recipe={**one.recipe, "beginning": beginning}) for one in found]

        with quiet():
            content = digest_of(itertools.chain.from_iterable(_content_of(task) for task in loaded.values()))
        key = {"task": name, **asked, "max_new_tokens": max_new_tokens, "seed": SEED}
        return self.kept({**key, "data": content}, compute)

    def geometry(self, window: int | None, stride: int | None) -> tuple[int, int]:
        try:
            return window_and_stride(self.config.max_position_embeddings, window, stride)
        except UserError as error:
            raise UserError(f"{self.model}: {error}") from None

    def counter(self, name: str, unit: str) -> Callable[[int, int], None]:
        return counted(self.progress, name, unit)


def counted(progress: Progress, name: str, unit: str) -> Callable[[int, int], None]:
    return lambda done, of: progress(f"{name}: {done:,} of {of:,} {unit}".rstrip(), done / max(1, of))


def _content_of(task: Any) -> list[Any]:
    """lm-eval's configuration of a task, and the documents that it evaluates and takes its shots from."""
    shots = task.fewshot_docs() if task.config.num_fewshot else []
    config = json.dumps(task.dump_config(), sort_keys=True, default=str)
    return [re.sub(" at 0x[0-9a-f]+", "", config), *task.eval_docs, *(shots or [])]  # functions without their addresses


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
