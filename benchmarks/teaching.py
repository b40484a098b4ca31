"""The full path: one small model pretrained, then taught in every way there is, all asked the same held-out questions.

python -m benchmarks.teaching --text input.txt          # half an hour on two quiet cores
python -m benchmarks.teaching --text input.txt --smoke  # the same at toy size, in a minute or two: for its own sake

The base reads scenes that teach it to look back, then the text given mixed with the built-in stories. Every stage after
it is a recipe that begins where its row says. Each model then answers the same questions about stories that nobody was
trained on, greedily and word for word, and is measured on stories and on the end of the text, which no stage has read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slmkit.adapt.load import load_model
from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.config import load_settings
from slmkit.data.prepare.text_to_shards import prepare_text
from slmkit.data.stories import held_out_questions, tell_many
from slmkit.data.stream import DocumentRows
from slmkit.device import find_device, keep_freed_memory
from slmkit.evaluation import ask, validation_loss
from slmkit.files.find import find_model_directory, find_tokenizer_directory
from slmkit.generation.ensemble import LanguageModel, together
from slmkit.tokenizer import SLMTokenizer
from slmkit.training.logging.metrics_log import environment
from slmkit.training.recipe.recipe import find_recipe, load_recipe
from slmkit.workflows.context import SILENCE
from slmkit.workflows.merge import prepare_merge, write_merge
from slmkit.workflows.train import train_recipe

RESULTS = Path(__file__).parent / "results" / "teaching.json"
SMOKE_DOCUMENTS = 40
MEASURED_SEED = 77_777  # of the stories that losses are measured on
SHAPE = "model={preset: quickstart, initialization: copying}"
TOY = (
    "train.max_steps=3", "train.num_train_epochs=null", "train.max_tokens=null", "train.eval_steps=3",
    "train.sample_tokens=4", "data.validation_documents=8",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A run: the recipe that comes with slmkit, the stage it begins from, and what is changed in it."""

    name: str
    what: str
    recipe: str
    start: str | None = None
    changes: tuple[str, ...] = ()


def stages(text: Path) -> list[Stage]:
    """All runs, in an order in which each finds what it begins from."""
    book = f"{{path: '{text}', name: text, weight: %s}}"
    scenes = f"[{{path: primer, weight: 0.9}}, {{path: stories, weight: 0.05}}, {book % 0.05}]"
    mixed = f"[{{path: stories, weight: 0.6}}, {{path: primer, weight: 0.1}}, {book % 0.3}]"
    reading = ("data.source=null", "data.primer_documents=0", "train.num_train_epochs=null")
    chats = "data.documents=8000"
    taught = "distillation={teacher: $sft, reads: conversations, alpha: 0.5, temperature: 2.0}"
    return [
        Stage("reader", "scenes first", "quickstart-primer", None, (*reading, f"data.sources={scenes}", SHAPE,
              "data.documents=6200", "train.max_tokens=500000")),
        Stage("base", "then the text, stories and scenes", "quickstart-stories", "reader", (*reading,
              f"data.sources={mixed}", "data.documents=9000", "train.max_tokens=2000000")),
        Stage("sft", "conversations", "quickstart-chat", "base", (chats,)),
        Stage("sft-2", "other conversations, another order", "quickstart-chat", "base", (chats, "seed=1")),
        Stage("lora", "the conversations of sft, by an adapter of rank 16", "quickstart-chat", "base", (chats,
              "lora={r: 16, lora_alpha: 32}", "train.optimizer=adamw", "train.learning_rate=3e-3",
              "train.weight_decay=0")),
        Stage("half", "half as many conversations", "quickstart-chat", "base", ("data.documents=4000",)),
        Stage("distill", "the same half, with sft as the teacher", "quickstart-chat", "base", ("data.documents=4000",
              "objective=distill", taught)),
        Stage("dpo", "right answers preferred to wrong ones", "quickstart-dpo", "sft", ("data.documents=1000",)),
        Stage("grpo", "rewarded for right answers", "quickstart-grpo", "sft"),
    ]  # fmt: skip


class Examiner:
    """The same questions and the same texts for every model."""

    def __init__(self, folder: Path, tokenizer: SLMTokenizer, text: str, stories: int, questions: int) -> None:
        told = [story.text for story in tell_many(MEASURED_SEED, stories)]
        self.tokenizer, self.device = tokenizer, find_device("cpu", "float32")
        self.stories = DocumentRows(prepare_text(told, tokenizer, folder / "stories"), 512)
        self.text = DocumentRows(prepare_text([text], tokenizer, folder / "text"), 512)
        self.questions = held_out_questions(questions)

    def examine(self, model: LanguageModel) -> dict[str, float]:
        answers = ask(model, self.tokenizer, self.questions)
        return {
            "questions": round(answers.share_right, 4),
            "standard_error": round(answers.standard_error, 4),
            "loss_on_stories": round(validation_loss(model, self.stories, self.device).loss, 4),
            "loss_on_text": round(validation_loss(model, self.text, self.device).loss, 4),
        }


def train(stage: Stage, folder: Path, smoke: bool) -> float:
    """Do a stage's run in `folder`; returns its seconds."""
    changes = [change.replace("$sft", str(folder / "sft")) for change in stage.changes]
    start = [f"model={{path: '{folder / stage.start}'}}"] if stage.start else []
    toy = TOY if smoke else ()
    if smoke:
        changes.append(f"data.documents={SMOKE_DOCUMENTS}")
        toy += ("grpo={prompts_per_step: 2, num_generations: 2, max_new_tokens: 4}",) if stage.name == "grpo" else ()
    recipe = load_recipe(
        find_recipe(stage.recipe),
        [*start, *changes, f"output_dir={folder / stage.name}", "train.device=cpu", "train.sample_prompts=[]", *toy],
    )
    started = time.perf_counter()
    train_recipe(recipe, SILENCE, force=smoke)
    return time.perf_counter() - started


def merge(folder: Path, name: str, **recipe: object) -> None:
    content = {"output_dir": str(folder / name), **recipe}
    write_merge(prepare_merge(load_settings(MergeRecipe, content)))


def opened(folder: Path, *names: str) -> LanguageModel:
    return together([load_model(find_model_directory(folder / name))[0] for name in names])


def walk(folder: Path, text: Path, questions: int, smoke: bool, tell: Callable[[dict], None]) -> list[dict]:
    """Every stage trained and examined: a row for each, which `tell` gets as it comes."""
    content = text.read_text(encoding="utf-8")
    cut = int(0.95 * len(content)) if not smoke else len(content) - 5000
    (folder / "text.txt").write_text(content[:cut], encoding="utf-8")
    rows: list[dict] = []
    examiner: Examiner | None = None

    def examined(name: str, what: str, start: str | None, seconds: float, *models: str) -> None:
        assert examiner is not None, "the first stage has made the tokenizer"
        rows.append({"model": name, "what": what, "from": start or "", "seconds": round(seconds)})
        rows[-1] |= examiner.examine(opened(folder, *models))
        tell(rows[-1])

    for stage in stages(folder / "text.txt"):
        seconds = train(stage, folder, smoke)
        if examiner is None:
            tokenizer = SLMTokenizer.from_pretrained(find_tokenizer_directory(folder / stage.name))
            examiner = Examiner(folder / "exam", tokenizer, content[cut:], 4 if smoke else 100, questions)
        examined(stage.name, stage.what, stage.start, seconds, stage.name)
    pair = [{"model": str(folder / name)} for name in ("sft", "sft-2")]
    sparse = [entry | {"density": 0.5} for entry in pair]
    for name, what, recipe in (
        ("linear", "the mean of both", {"merge_method": "linear", "models": pair}),
        ("ties", "both changes of the base, half of each", {"merge_method": "ties", "models": sparse}),
    ):
        base = {"base_model": str(folder / "base")} if name == "ties" else {}
        started = time.perf_counter()
        merge(folder, name, **recipe, **base)
        examined(name, what, "sft, sft-2", time.perf_counter() - started, name)
    examined("ensemble", "both asked, probabilities averaged", "sft, sft-2", 0.0, "sft", "sft-2")
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| model | from | what | seconds | questions right | loss on stories | loss on the text |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        right = f"{row['questions']:.1%} ± {row['standard_error']:.1%}"
        losses = f"{row['loss_on_stories']:.3f} | {row['loss_on_text']:.3f}"
        lines.append(f"| `{row['model']}` | {row['from']} | {row['what']} | {row['seconds']} | {right} | {losses} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="toy size, nothing written but what is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        questions = 4 if arguments.smoke else arguments.questions
        rows = walk(Path(folder), arguments.text, questions, arguments.smoke, lambda row: print(row, flush=True))
    print(table(rows))
    result = {
        "date": datetime.date.today().isoformat(),
        "what": f"one model of the quickstart's shape, {questions} held-out questions; ± is one standard error",
        "text": arguments.text.name,
        "threads": arguments.threads,
        "environment": environment(),
        "rows": rows,
    }
    if not arguments.smoke:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
