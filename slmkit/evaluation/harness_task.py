"""lm-eval's task with what a small model and local files need. It imports lm-eval: import it where it is needed.

Shots are dropped whole, the last first, until the prompt and the answer fit into the model's context. A generation
whose prompt does not fit without shots is not asked (`no_room`).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.api.task
import lm_eval.utils
from jinja2 import TemplateError
from lm_eval.api.registry import get_metric, get_metric_aggregation, is_higher_better
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from slmkit.config import UserError, one_line
from slmkit.evaluation.task_files import MissingFileError

# lm-eval compiles its templates for every document and shot: 3/4 of the time in which prompts are made.
lm_eval.utils.env.from_string = lru_cache(4096)(lm_eval.utils.env.from_string)
ACCURACIES = ("acc", "acc_norm", "acc_bytes")


class FittedTask(ConfigurableTask):
    """An lm-eval task. `about` goes into the recipe: its files or place on the hub, and where its shots are from.

    `prepare` sets it up for a model; then `no_room` has the numbers of the documents that are not asked, `shots` the
    number of shots of each document that is, and `too_long` the number of documents that are cut on the left.
    """

    def __init__(self, config: dict[str, Any], about: Mapping[str, Any], chat: bool) -> None:
        self.about, self.data, self.chat = about, about["data"], chat
        self.lm: Any = None
        self.no_room: set[int] = set()
        self.shots: dict[int, int] = {}
        self.too_long = 0
        super().__init__(config=config)
        own = callable(self.config.process_results)
        if self.OUTPUT_TYPE == "multiple_choice" and not self.multiple_input and not own:
            for metric in ACCURACIES:
                self._metric_fn_list.setdefault(metric, get_metric(metric))
                self._metric_fn_kwargs.setdefault(metric, {})
                self._aggregation_list.setdefault(metric, get_metric_aggregation(metric))
                self._higher_is_better.setdefault(metric, is_higher_better(metric))

    @cached_property
    def eval_docs(self) -> Any:  # lm-eval converts all documents whenever they are asked for
        return super().eval_docs

    @property
    def new_tokens(self) -> int:
        """How many tokens an answer may have; 0 for tasks that generate none."""
        if self.OUTPUT_TYPE != "generate_until":
            return 0
        own = dict(normalize_gen_kwargs(dict(self.config.generation_kwargs)))["max_gen_toks"]
        return getattr(self.lm, "max_new_tokens", None) or own

    @property
    def context(self) -> int:
        """Positions of the model."""
        return getattr(self.lm, "context", None) or self.lm.max_length

    def prepare(self, lm: Any, limit: int | None, seed: int) -> None:
        """Set the task up for a model. Raises `UserError` if answers, or too few examples, leave no room."""
        self.lm, self.no_room = lm, set()
        shots, documents = self.config.num_fewshot or 0, len(self.eval_docs)
        if self.new_tokens >= self.context:
            raise UserError(
                f"{self.task_name}: answers of up to {self.new_tokens:,} tokens leave no room for a prompt in the "
                f"model's {self.context:,} positions: give --max-new-tokens, such as {self.context // 2}"
            )
        if shots and self.about["shots from"] == "rows that are not evaluated":
            self.sampler.replace_df(list(self.eval_docs)[limit or documents :])
        asked = [doc for _, doc in super().doc_iterator(limit=limit)]
        self._expect_answers(asked)
        # Where the document itself may be among them, lm-eval draws one more and leaves out all its copies.
        is_among = type(self.sampler) is ContextSampler and self.fewshot_cfg.split == self.config.test_split
        examples = Counter(map(repr, self.sampler.df)) if shots else Counter[str]()
        copies = max((examples[repr(doc)] for doc in asked), default=0) if is_among else 0
        if shots and examples.total() - max(copies, is_among) < shots:
            there = f"there are {examples.total()} ({self.about['shots from']}"
            there += f", {copies} of them the same as a document that is asked" * (copies > 1)
            raise UserError(
                f"{self.task_name}: {shots} shots need {shots + is_among} examples, and {there}): add a train file, "
                "evaluate fewer rows with --limit, or give --shots 0"
            )
        if self.OUTPUT_TYPE == "generate_until":
            template, prompt = self.lm.apply_chat_template if self.chat else None, super().fewshot_context
            chat = {"apply_chat_template": self.chat, "fewshot_as_multiturn": self.chat, "chat_template": template}
            how = [chat | {"gen_prefix": self.doc_to_prefix(doc)} for doc in asked]
            fits = (self._fits(doc, prompt(doc, 0, **its), **its) for doc, its in zip(asked, how))
            self.no_room = {number for number, it_fits in enumerate(fits) if not it_fits}
        self.set_fewshot_seed(seed)

    def _expect_answers(self, docs: Sequence[Any]) -> None:
        """Raise `UserError` for the first document of a local file without a question, or without a right choice."""
        for number, doc in enumerate(docs if "hub" not in self.data else ()):
            try:
                question, right = self.doc_to_text(doc), self.doc_to_target(doc)
                if self.OUTPUT_TYPE == "multiple_choice":
                    right, choices = question if self.multiple_input else right, self.doc_to_choice(doc)
                    if not {*(right if isinstance(right, list) else [right])} <= {*choices, *range(len(choices))}:
                        raise ValueError(f"its right answer {right!r} is not among {len(choices)} choices")
            except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
                where = f"document {number} of {self.data['name']}"
                raise UserError(f"{self.task_name}: {where} is not as expected: {one_line(error)}") from None

    def doc_iterator(self, **which: Any) -> Iterator[tuple[int, Any]]:
        return ((number, doc) for number, doc in super().doc_iterator(**which) if number not in self.no_room)

    def is_full(self, limit: int | None) -> bool:
        """Whether no document can be asked."""
        return next(self.doc_iterator(limit=limit), None) is None

    def build_all_requests(self, **options: Any) -> None:
        self._used: list[int] = []
        self.too_long = 0
        super().build_all_requests(**options)
        self.shots = dict(zip(dict.fromkeys(instance.doc_id for instance in self.instances), self._used))

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> str | list[str]:
        """lm-eval's prompt with as many of the drawn shots as fit."""
        drawn, sampler = list[Any](), getattr(self, "sampler", SimpleNamespace(sample=None))
        draw = sampler.sample

        def sample(n: int, **keywords: Any) -> list[Any]:
            if not drawn:
                drawn.extend(draw(n, **keywords))
            return drawn[:n]

        sampler.sample = sample
        try:
            for count in range(num_fewshot, -1, -1):
                context = super().fewshot_context(doc, count, **options)
                fits = self._fits(doc, context, **options)
                if fits or count == 0:
                    break
        finally:
            sampler.sample = draw
        self._used.append(count)
        self.too_long += not fits
        return context

    def _fits(self, doc: dict[str, Any], context: str | list[str], **options: Any) -> bool:
        """Whether the prompt and the longest answer fit into the model's context."""
        if self.OUTPUT_TYPE == "loglikelihood_rolling":
            return True  # read in windows
        if self.OUTPUT_TYPE == "generate_until":
            return len(self.lm.tok_encode(context)) + self.new_tokens <= self.context
        asked = self.construct_requests(doc, context, apply_chat_template=options.get("apply_chat_template", False))
        texts = {"".join(one.args[:2]) for one in (asked if isinstance(asked, list) else [asked])}
        # The last token is predicted, not read.
        return max(len(self.lm.tok_encode(text)) for text in texts) - 1 <= self.context

    def apply_filters(self) -> Any:
        """lm-eval's filters, after special tokens and what follows them are cut off the answers."""
        tokenizer = getattr(self.lm, "tokenizer", None)
        special = [*getattr(tokenizer, "special_tokens", getattr(tokenizer, "all_special_tokens", ()))]
        if self.OUTPUT_TYPE == "generate_until" and special:
            pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
            for instance in self.instances:
                instance.resps = [next(filter(None, pattern.split(text)), "") for text in instance.resps]
        return super().apply_filters()


class Factory(TaskFactory):
    """lm-eval's factory, with `make` for tasks that are configurations: it gets the configuration, in which functions
    of code tasks are not yet imported, since importing lm-eval's runs a program. `missing`: the tasks without files.
    """

    def __init__(self, make: Callable[[dict[str, Any]], FittedTask]) -> None:
        super().__init__()
        self._make, self.missing = make, dict[str, MissingFileError]()

    def _build_task(self, entry: Entry, overrides: dict[str, Any] | None) -> Any:
        if entry.kind is Kind.PY_TASK:
            return super()._build_task(entry, overrides)
        is_code = (entry.cfg or {}).get("unsafe_code")
        plain = Entry(entry.name, entry.kind, None, entry.cfg, entry.tags) if is_code else entry
        config = self._load_full_config(plain, overrides)
        try:
            return self._make({key: value for key, value in config.items() if key not in ("tag", "group", "task_list")})
        except MissingFileError as error:  # the others of a group may lack theirs, too
            self.missing[config["task"]] = error
            return SimpleNamespace(task_name=config["task"])


def evaluated(lm: Any, tasks: Mapping[str, FittedTask], limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of each task that was prepared and has a document to ask."""
    found = dict[str, list[dict[str, Any]]]()
    for chat in (False, True):
        asked = {name: task for name, task in tasks.items() if task.chat is chat and not task.is_full(limit)}
        if asked:
            how = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "confirm_run_unsafe_code": True}
            found |= evaluate(lm, {"tasks": asked}, limit=limit, bootstrap_iters=0, **how)["samples"]
    return found


@contextlib.contextmanager
def quiet(offline: bool = False) -> Iterator[None]:
    """No log lines below errors, no progress bars of lm-eval and datasets; `offline`: no attempt to reach the hub."""
    loggers, bars = [*map(logging.getLogger, ("lm_eval", "huggingface_hub"))], datasets.are_progress_bars_disabled()
    levels, hub = [logger.level for logger in loggers], huggingface_hub.constants
    before = lm_eval.api.task.tqdm, datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        lm_eval.api.task.tqdm, datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
        if not bars:
            datasets.enable_progress_bars()
