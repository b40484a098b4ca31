"""`slm quickstart`: the whole life of a small model, offline, in minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from slmkit.generation import LanguageModel
    from slmkit.tokenizer import SLMTokenizer

QUESTIONS = 200
CONVERSATION = ("Tell me a story about a fox and a lantern.", "Thank you!")


def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for its runs.")] = "runs/quickstart",
    seed: Annotated[int, typer.Option(help="Another seed gives other stories and another model.")] = 0,
    minutes: Annotated[
        float, typer.Option(help="How long it may take; on a slower machine it trains on fewer stories.")
    ] = 5.0,
) -> None:
    """Train a small model on built-in stories, in minutes.

    Tokenizer, pretraining, fine-tuning and evaluation; at the end the model tells a story and answers questions. Needs
    no network and no GPU.

    Example: slm quickstart -o runs/first
    """
    import time

    from slmkit.api import train_quickstart
    from slmkit.cli.show import TerminalReporter, load_model
    from slmkit.training.progress import clock

    started = time.monotonic()
    reporter = TerminalReporter()
    trained = train_quickstart(output, seed, minutes, reporter)
    base, talker = trained.stories, trained.chat

    reporter.say("\n4/4  evaluation: stories it never saw, questions on things it never met together")
    decoder, tokenizer = load_model(str(talker.root), "cpu")
    _show_story(base.root)
    _show_conversation(decoder, tokenizer)
    _show_figures(base.root, decoder, tokenizer)
    print(f"\nruns: {base.root} and {talker.root}, after {clock(time.monotonic() - started)}")
    print("next:")
    print(f"  slm chat {talker.root}")
    print(f'  slm generate {base.root} "Once upon a time"')
    print("  slm train own-text data.source=YOUR.txt output_dir=runs/mine")


def _show_story(base: Path) -> None:
    """A story from nothing: the model begins where documents begin."""
    from slmkit.cli.show import load_model
    from slmkit.generation import SamplingSettings, complete

    decoder, tokenizer = load_model(str(base), "cpu")
    settings = SamplingSettings(temperature=0.5, min_p=0.1, seed=1)
    print("\nA story:\n")
    print(complete(decoder, tokenizer, "", settings=settings, max_new_tokens=400).text.strip())


def _show_conversation(decoder: LanguageModel, tokenizer: SLMTokenizer) -> None:
    from slmkit.generation import ChatSession, SamplingSettings

    session = ChatSession(decoder, tokenizer, SamplingSettings(temperature=0.5, min_p=0.1, seed=2), max_new_tokens=400)
    print("\nA conversation:\n")
    for line in CONVERSATION:
        print(f"you> {line}")
        print("".join(session.reply(line)).strip())


def _show_figures(base: Path, decoder: LanguageModel, tokenizer: SLMTokenizer) -> None:
    """The validation loss beside a perfect model's, and the share of questions answered exactly."""
    from slmkit.api import evaluate_run
    from slmkit.data.stories import held_out_questions
    from slmkit.evaluation import ask

    figures = evaluate_run(base)
    questions = ask(decoder, tokenizer, held_out_questions(QUESTIONS))
    print("\nThe figures:\n")
    assert figures.perfect_loss is not None, "the built-in corpus knows its own probability"
    above = figures.report.loss / figures.perfect_loss - 1
    print(f"  validation loss           {figures.report.loss:.3f} nats per token")
    print(f"  loss of a perfect model   {figures.perfect_loss:.3f}, so {above:.1%} above it")
    print(
        f"  questions answered        {questions.share_right:.1%} of {len(questions.answers)}, word for word"
        f" (± {questions.standard_error:.1%})"
    )
