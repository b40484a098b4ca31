"""Hooks of the training loop: validation, evaluation on tasks, and text samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slmkit.config import UserError, did_you_mean
from slmkit.data.prepare.corpus import Corpus
from slmkit.data.settings import Reads
from slmkit.data.sources import STORY_WORLDS
from slmkit.device import Device
from slmkit.evaluation import validation_loss
from slmkit.evaluation.loss import LossReport, Rows
from slmkit.evaluation.results import FORMS, TaskResult
from slmkit.generation.chat import ChatSession
from slmkit.generation.generator import TextStream
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.decoder import Decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.distributed import ALONE, Group
from slmkit.training.logging.metrics_log import append_samples
from slmkit.training.loop import Goal, Report, State
from slmkit.training.recipe.recipe import Recipe, TrainSettings
from slmkit.workflows.context import RecipeContext


class Validate:
    """Hook for all ranks that adds `validation_loss` (nats per token) to the report; rows are shared among ranks.

    If the rows are a whole text of `text_bytes` bytes, it adds `validation_bits_per_byte`.
    """

    def __init__(
        self, rows: Rows, device: Device, separate: bool = False, group: Group = ALONE, text_bytes: int | None = None
    ) -> None:
        self.rows, self.device, self.separate, self.group, self.text_bytes = rows, device, separate, group, text_bytes

    def __call__(self, state: State, report: Report) -> None:
        group = self.group
        with group.whole(state.model):
            mine = validation_loss(
                state.model, self.rows, self.device, separate=self.separate, rank=group.rank, world=group.world
            )
        nats, tokens = group.sum(mine.nats, mine.tokens)
        whole = LossReport(nats, int(tokens))
        report["validation_loss"] = whole.loss
        if self.text_bytes:
            report["validation_bits_per_byte"] = whole.bits_per_byte(self.text_bytes)


class RunTasks:
    """Hook for all ranks in which rank 0 evaluates the model on the tasks of `train.eval_tasks`.

    It adds `eval/TASK/METRIC` to the report, and its standard error as `eval/TASK/METRIC_stderr`; of a group of tasks
    only the group's. An evaluation that fails is a warning, and its figures are missing: it does not end the run.
    """

    def __init__(self, context: RecipeContext) -> None:
        """Raises `UserError` on rank 0 for a task that is not known, or whose data or package is missing."""
        self.context, self.settings, self.chat = context, context.recipe.train, context.recipe.reads != "text"
        self.tasks: Any = tasks_of(self.settings, self.chat) if context.group.is_main else {}

    def try_out(self) -> dict[str, bool]:
        """Ask the first document of every task. Returns the metrics, and whether more of each is better.

        Raises `UserError` for a task that cannot be run with this model, or whose self-test fails.
        """
        model = self.context.model.eval()
        with in_recipe_terms():
            if self.tasks:
                from slmkit.evaluation.tasks import expect_self_test

                expect_self_test(self._engine(model), self.tasks, self.settings.eval_limit)
            results = self._results(model, limit=1)
        return {
            f"eval/{result.task}/{metric}": FORMS[result.metrics[metric]].higher_is_better
            for result in results
            for metric in logged(result)
        }

    def __call__(self, state: State, report: Report) -> None:
        group, figures = self.context.group, {}
        with group.whole(state.model):
            if group.is_main:
                try:
                    figures = figures_of(self._results(state.model.eval(), self.settings.eval_limit))
                except Exception as error:  # a failed evaluation must not end the run
                    self.context.warn(f"step {state.step}: evaluation on tasks failed: {type(error).__name__}: {error}")
        report |= group.from_main(figures)

    def _results(self, model: Decoder, limit: int | None) -> list[TaskResult]:
        tokenizer, results = self.context.corpus.tokenizer, []
        if self.tasks:
            from slmkit.evaluation.tasks import run_tasks

            found = run_tasks(self._engine(model), self.tasks, limit=limit)
            in_groups = {task for group in self.tasks.groups.values() for task in group.tasks}
            results += [result for result in found if result.task not in in_groups]
        for source in (name for name in self.settings.eval_tasks if name in STORY_WORLDS):
            from slmkit.evaluation.stories import COUNT, story_report

            results += story_report(model, tokenizer, chat=self.chat, count=limit or COUNT, source=source)
        return results

    def _engine(self, model: Decoder) -> Any:
        from slmkit.evaluation.harness import EngineLM

        return EngineLM(model, self.context.corpus.tokenizer, max_new_tokens=self.settings.eval_max_new_tokens)


KEYS_OF_OPTIONS = {
    "--task-data": "train.eval_task_data",
    "--max-new-tokens": "train.eval_max_new_tokens",
    "--limit": "train.eval_limit",
}


def tasks_of(settings: TrainSettings, chat: bool) -> dict[str, Any]:
    """The tasks of lm-eval among `train.eval_tasks`, by name.

    Raises `UserError` for one that is not known, and where its data or lm-eval is missing.
    """
    names = [name for name in settings.eval_tasks if name not in STORY_WORLDS]
    if not names:
        return {}
    from slmkit.evaluation.tasks import load_tasks

    data = None if settings.eval_task_data is None else Path(settings.eval_task_data)
    with in_recipe_terms():
        return load_tasks(names, data=data, chat=chat)


@contextlib.contextmanager
def in_recipe_terms() -> Iterator[None]:
    """Context manager in which a `UserError` that names an option of `slm eval` names the recipe's key instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for option, key in KEYS_OF_OPTIONS.items():
            text = text.replace(option, key)
        raise UserError(text) from None


# What is logged of a story world; `slm eval` has the rest.
OF_STORIES = {
    "questions": ("accuracy",), "scenes": ("accuracy",), "loss": ("bits_per_byte",),
    "loss-heldout": ("bits_per_byte",), "written-1": ("consistent", "novel_8grams"),
    "written-0.8": ("consistent", "novel_8grams"), "generator": (),
}  # fmt: skip


def logged(result: TaskResult) -> Iterable[str]:
    """The metrics of a result that are logged."""
    task, _, part = result.task.partition("/")
    return OF_STORIES[part] if task in STORY_WORLDS else result.metrics


def figures_of(results: list[TaskResult]) -> Report:
    """The figures for a report: of each task and metric its value and its standard error, if there is one."""
    figures: Report = {}
    for result in results:
        for metric in logged(result):
            score = result.score(metric)
            figures[f"eval/{result.task}/{metric}"] = score.value
            if score.standard_error is not None:
                figures[f"eval/{result.task}/{metric}_stderr"] = score.standard_error
    return figures


def goal_of(metric: str, measures: Mapping[str, bool]) -> Goal:
    """The goal of `train.metric_for_best_model`. `measures`: the metrics of a run, and whether more of each is better.

    Raises `UserError` for one that is not among them.
    """
    if metric not in measures:
        raise UserError(
            f"train.metric_for_best_model {metric}: not measured in this run; {did_you_mean(metric, measures)}"
        )
    return Goal(metric, measures[metric])


class WriteSamples:
    """Hook for all ranks that writes the model's continuations of the recipe's prompts to `samples.md`."""

    def __init__(self, file: Path, recipe: Recipe, tokenizer: SLMTokenizer, group: Group = ALONE) -> None:
        self.file, self.recipe, self.tokenizer, self.group = file, recipe, tokenizer, group

    def __call__(self, state: State, report: Report) -> None:
        with self.group.whole(state.model):
            if self.group.is_main:
                prompts = self.recipe.train.sample_prompts or []
                append_samples(
                    self.file, state.step, [(prompt, self._written(state.model, prompt)) for prompt in prompts]
                )

    def _written(self, model: Decoder, prompt: str) -> str:
        settings = SamplingSettings(temperature=0.8, top_p=0.95, seed=self.recipe.seed)
        longest = self.recipe.train.sample_tokens
        try:
            if self.recipe.reads == "text":
                return "".join(TextStream(model, self.tokenizer, prompt, settings=settings, max_new_tokens=longest))
            session = ChatSession(model, self.tokenizer, settings, max_new_tokens=longest)
            return "\n" + "".join(session.reply(prompt))  # the prompts are user messages
        except UserError as error:  # a failed sample must not end the run
            return f" ({error})"


WORDS, CHARACTERS = 5, 40  # taken from a text's beginning
LONGEST_QUESTION = 100  # characters
QUESTION_WORDS = 3
LOOKED_AT = 50  # documents searched
MARK = "QUESTION"


def with_prompts(recipe: Recipe, corpus: Corpus) -> Recipe:
    """The recipe with a prompt for its samples, unless `sample_prompts` is set, also to an empty list."""
    if recipe.train.sample_prompts is not None:
        return recipe
    train = recipe.train.model_copy(update={"sample_prompts": prompts_of(corpus, recipe.reads)})
    return recipe.model_copy(update={"train": train})


def prompts_of(corpus: Corpus, reads: Reads) -> list[str]:
    """One prompt: the beginning of a held-out text, or the shortest first question of held-out conversations with at
    least `QUESTION_WORDS` words, or else the shortest.

    Empty if none of the first documents has a short one.
    """
    shards, tokenizer = corpus.validation, corpus.tokenizer
    ends = shards.document_ends[:LOOKED_AT].tolist()
    documents = [*zip([0, *ends], ends)]  # start and end of each
    if reads == "text":
        heads = (shards.tokens_in(start, min(end, start + 64)) for start, end in documents)
        beginnings = (_beginning(tokenizer.decode(head, skip_special_tokens=True)) for head in heads)
        return [*itertools.islice(filter(None, beginnings), 1)]
    before, behind = _around_a_question(corpus)
    asked = (shards.tokens_in(start, start + int(shards.trained_in(start, end).argmax())) for start, end in documents)
    questions = filter(None, (_question(tokenizer.decode(ids), before, behind) for ids in asked))
    return sorted(questions, key=lambda question: (len(question.split()) < QUESTION_WORDS, len(question)))[:1]


def _beginning(text: str) -> str:
    """The first words of the first line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[0].split()[:WORDS])[:CHARACTERS].rstrip("\ufffd ") if lines else ""


def _around_a_question(corpus: Corpus) -> tuple[str, str]:
    """The chat template's text before and after a user's last message."""
    tokenizer, user = corpus.tokenizer, {"role": "user", "content": MARK}
    first, later = (
        tokenizer.decode(tokenizer.encode_chat(messages, add_generation_prompt=True).ids).split(MARK)
        for messages in ([user], [user, {"role": "assistant", "content": MARK}, user])
    )
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first[0]), reversed(later[-2])))
    return "".join(letter for letter, _ in same)[::-1], first[-1]


def _question(text: str, before: str, behind: str) -> str:
    """The first message in a rendered conversation; empty if there is none, or it is long."""
    if not (before and behind):
        return ""
    _, found, rest = text.partition(before)
    question = rest.partition(behind)[0]
    return question.strip() if found and len(question) <= LONGEST_QUESTION and "\n" not in question else ""
