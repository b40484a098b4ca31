"""How good a model is: `slm eval`, `compare` and `report`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from slmkit.cli.options import DeviceName, Options, Precision, RunPath, SourceOptions, sources_of, with_options
from slmkit.config import UserError

if TYPE_CHECKING:
    from slmkit.evaluation.results import TaskResult

Models = Annotated[list[str], typer.Argument(metavar="MODEL", help="Model directories, adapters or runs.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="A JSON file for figures, recipes, items.")]
TWO_OR_MORE = "Models as for `slm eval`, two or more; the first one is A."
RESULTS = "What `slm eval --output` wrote; default: evaluations of RUN that are still known."
TEXT = "A file, folder, URL, data set of the hub, or wikitext-2; may be given several times."
STRIDE = "Tokens by which the window moves on; default: half of it. More is faster and gives tokens less context."
TASK_DATA = "A folder with the tasks' files; default: the hub."
WINDOW = "Tokens read at once; default: the context, at most 2,048."
TEMPLATE = "Ask tasks as conversations: chat, none, or auto: if it learned some."
UNSAFE = "Where there is no sandbox, run the programs of code tasks with limits of time and memory alone."
Count = int | None
# Options that `eval` and `compare` have in common.
OPTIONS: Options = {
    "tasks": (Annotated[str | None, typer.Option(help="Tasks with commas between them, such as arc,stories.")], None),
    "text": (Annotated[list[str] | None, typer.Option("--text", "--data", "-d", help=TEXT)], None),
    "source": (SourceOptions, None),
    "chat": (Annotated[bool, typer.Option("--chat", help="The text is conversations; answers are predicted.")], False),
    "window": (Annotated[Count, typer.Option("--window", "--length", min=2, help=WINDOW)], None),
    "stride": (Annotated[Count, typer.Option(min=1, help=STRIDE)], None),
    "joined": (Annotated[bool, typer.Option("--joined", help="All documents are one stream, not each apart.")], False),
    "task_data": (Annotated[Path | None, typer.Option(exists=True, file_okay=False, help=TASK_DATA)], None),
    "limit": (Annotated[Count, typer.Option(min=1, help="Only the first documents of each task or text.")], None),
    "shots": (Annotated[Count, typer.Option(min=0, help="Examples in a prompt; default: as the task says.")], None),
    "template": (Annotated[Literal["auto", "chat", "none"], typer.Option(help=TEMPLATE)], "auto"),
    "max_new_tokens": (Annotated[Count, typer.Option(min=1, help="Of an answer; default: as the task says.")], None),
    "samples": (Annotated[int, typer.Option(min=1, help="Answers to each problem of code tasks, for pass@k.")], 1),
    "temperature": (Annotated[float | None, typer.Option(min=0, help="At which these answers are drawn.")], None),
    "unsafe_code": (Annotated[bool, typer.Option("--unsafe-code", help=UNSAFE)], False),
    "cache": (Annotated[bool, typer.Option("--cache/--no-cache", help="Take what was evaluated before.")], True),
    "device": (DeviceName, "auto"),
    "precision": (Precision, "auto"),
}
RECIPE_WIDTH = 100  # columns
STORED_ANSWERS = ("oracle", "wrong")  # in place of a model: right and wrong answers
FOR_TEXT = ("source", "chat", "window", "stride", "joined")
FOR_TASKS = ("task_data", "shots", "template", "max_new_tokens", "samples", "temperature", "unsafe_code")


def settings_of(models: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `evaluate`. Raises `UserError` for options that do not belong together, and for what is not there."""
    from slmkit.files.find import find_model_directory
    from slmkit.workflows.evaluation.text import find_text

    tasks = [name.strip() for name in (options["tasks"] or "").split(",") if name.strip()]
    if not tasks and not options["text"]:
        raise UserError("nothing to evaluate on: give --text FILE, --tasks NAMES, or both")
    for needed, names, is_given in (("text", FOR_TEXT, options["text"]), ("tasks", FOR_TASKS, tasks)):
        alone = [name for name in names if not is_given and options[name] != OPTIONS[name][1]]
        if alone:
            raise UserError(f"--{alone[0].replace('_', '-')} is for --{needed}, which is not given")
    if options["chat"] and options["joined"]:
        raise UserError("--joined is for plain text: conversations (--chat) are each read apart")
    texts = sources_of([find_text(path) for path in options["text"] or []], options["source"])
    for model in models:
        if model not in STORED_ANSWERS or Path(model).exists():
            find_model_directory(model)
    same = {name: value for name, value in options.items() if name not in ("source", "chat", "template")}
    named = {"tasks": tasks, "text": texts, "conversations": options["chat"], "chat_template": options["template"]}
    return same | named


@with_options(OPTIONS)
def eval_(models: Models, output: Output = None, **options: Any) -> None:
    """Measure models on texts and tasks.

    On a text: loss, perplexity and bits per byte, with a sliding window. Bits per byte can be compared between models
    with different tokenizers. On tasks of lm-eval, and on `stories`: their own figures. The recipe of each figure is
    printed below.

    In place of a model, `oracle` gives the right answers of exact-match and code tasks, and `wrong` wrong ones: they
    show that a task can be measured.

    Example: slm eval runs/book runs/book-2 --text other.txt
    Example: slm eval runs/book --tasks stories --limit 50 --output results.json
    Example: slm eval oracle wrong --tasks humaneval --task-data evals
    """
    from slmkit.cli.show import print_table, progress_bar

    expect_new_file("--output", output)
    settings = settings_of(models, options)
    from slmkit.workflows.evaluation.evaluate import evaluate  # imports torch: after the arguments were checked

    found: list[tuple[str, TaskResult]] = []
    for model in models:
        with progress_bar(model) as show:
            found += ((model, result) for result in evaluate(model, progress=show, **settings))
    if output is not None:
        content = [{"model": model, **result.to_json()} for model, result in found]
        Path(output).write_text(json.dumps({"results": content}, default=str, indent=1) + "\n", encoding="utf-8")
    rows = [
        (model, result.task, metric, figure(result, metric), f"{result.score(metric).n:,}")
        for model, result in found
        for metric in result.metrics
    ]
    print_table(("model", "task", "metric", "figure", "n"), rows, right=("n",))
    print_recipes(found)


@with_options(OPTIONS)
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=TWO_OR_MORE)],
    results: Annotated[bool, typer.Option("--results", help="MODEL: files that `slm eval --output` wrote.")] = False,
    picture: Annotated[str | None, typer.Option(help="A picture of the differences: .png, .svg or .pdf.")] = None,
    output: Output = None,
    **options: Any,
) -> None:
    """Say whether models differ, by more than chance.

    Evaluates them with the same options and compares the others with the first one, item by item: for each task the
    difference with its 95 % interval, its p value and a verdict. Texts are compared in bits per byte, which do not
    depend on the tokenizer.

    Example: slm compare runs/book runs/book-2 --text other.txt
    Example: slm compare --results a.json b.json --picture difference.png
    """
    from slmkit.cli.show import print_table, progress_bar

    for name, path in (("--output", output), ("--picture", picture)):
        expect_new_file(name, path)
    if picture is not None and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {picture}: expected a name that ends in .png, .svg or .pdf")
    if results and (options["text"] or options["tasks"]):
        raise UserError("--results compares what is in the files: leave out --text and --tasks")
    if not results and len(models) < 2:
        raise UserError(f"compare: expected two or more models, such as slm compare {models[0]} OTHER --text FILE")
    settings = {} if results else settings_of(models, options)
    from slmkit.workflows.evaluation import compare as workflow

    if results:
        found = workflow.compare_results(*workflow.read_results(models))
    else:
        with progress_bar("compare") as show:
            found = workflow.compare(
                models, progress=lambda model, what, share: show(f"{model}: {what}", share), **settings
            )
    if output is not None:
        Path(output).write_text(json.dumps(found.to_json(), default=str, indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        workflow.draw(found, Path(picture))
    print("\n".join(f"{letter}  {model}" for letter, model in zip(workflow.LETTERS, found.models)) + "\n")
    print_table(*workflow.table(found), right=("items", "p"))
    meaning = [f"p is corrected for {len(found.rows)} comparisons (Holm)"] * (len(found.rows) > 1)
    if any("would take" in row.verdict for row in found.rows):
        meaning.append("with the items that it would take, a difference of this size is shown in 4 of 5 evaluations")
    recipes = recipe_lines((row.task, row.recipe) for row in found.rows)
    print_lines(["; ".join(meaning)] * bool(meaning) + [*found.notes, *recipes])


def expect_new_file(option: str, path: str | None) -> None:
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UserError(f"{option} {path}: expected the name of a file in a folder that exists")


def figure(result: TaskResult, metric: str) -> str:
    """`0.3120 ± 0.0147`, or `0.0000 (0.0000 to 0.0229)`."""
    from slmkit.evaluation.intervals import in_digits

    value, error = in_digits(result, metric)
    return f"{value} ({error})" if " to " in error else f"{value} {error}".rstrip()


def print_recipes(found: Sequence[tuple[str, TaskResult]]) -> None:
    """Each recipe with the tasks that have it, and what could not be asked."""
    lines = recipe_lines((result.task, result.recipe) for _, result in found)
    refused = [(model, result.task, result.errors) for model, result in found if result.errors]
    print_lines([*lines, *(f"{one}, {task}: {len(its):,} not asked, such as {its[0]}" for one, task, its in refused)])


def recipe_lines(recipes: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    tasks: dict[str, dict[str, None]] = {}
    for task, recipe in recipes:
        tasks.setdefault(stated(recipe), {})[task] = None
    return [f"{', '.join(names)}: {recipe}" for recipe, names in tasks.items()]


def print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print("\n" + textwrap.fill(line, RECIPE_WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def stated(recipe: Mapping[str, Any]) -> str:
    """A recipe as text; of hashes the first digits."""

    def one(value: Any) -> str:
        if isinstance(value, Mapping):
            return " ".join(f"{key} {one(its)}" for key, its in value.items() if its is not None)
        if isinstance(value, list | tuple):
            return ", ".join(map(one, value))
        return value[:12] if isinstance(value, str) and len(value) == 64 and " " not in value else str(value)

    return "; ".join(
        f"{key.replace('_', ' ')} {one(value)}" for key, value in recipe.items() if value not in (None, {})
    )


def report(
    run: RunPath,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The file; default: RUN/report.html.")] = None,
    results: Annotated[list[str] | None, typer.Option(metavar="FILE.json", help=RESULTS)] = None,
) -> None:
    """Write all that is known of a run into one HTML file.

    Curves, evaluation, samples, data, time and cost, configuration, environment and checkpoints, for a browser or for
    paper. The file needs no network and no other file. The run may still be running.

    Example: slm report runs/book -o book.html
    """
    from slmkit.files.find import find_run

    root = find_run(run)
    path = root / "report.html" if output is None else Path(output)
    expect_new_file("--output", str(path))
    from slmkit.workflows.evaluation.report import write_report  # imports torch: after the arguments were checked

    print(write_report(root, path, results or ()))
