"""`slm quickstart`: from a tokenizer to a model that answers, offline, in minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.tokenizer import SLMTokenizer
    from slmkit.workflows.quickstart import Quickstart

QUESTIONS = 200
SCENE = 5  # stream of the scene that is shown; not used in training
STORY = "Tell me a story about a fox and a lantern."


def quickstart(
    output: Annotated[str, typer.Option("--output", "-o", help="The folder for its runs.")] = "runs/quickstart",
    seed: Annotated[int, typer.Option(help="Another seed gives other stories and another model.")] = 0,
    minutes: Annotated[
        float, typer.Option(min=0.5, help="How long it may take; on a slower machine it learns a smaller world.")
    ] = 5.0,
) -> None:
    """Train a small model on built-in stories, in minutes.

    Tokenizer, pretraining, fine-tuning and evaluation; at the end the model answers questions and tells a story. Needs
    no network and no GPU.

    Example: slm quickstart -o runs/first
    Example: slm quickstart --minutes 10
    """
    import time

    started = time.monotonic()
    from slmkit.cli.show import TerminalReporter, load_for_generation, suggestion

    reporter = TerminalReporter()
    reporter.say("measuring this machine's speed, in at most about 20 seconds once PyTorch is loaded")
    from slmkit.training.logging.progress import clock
    from slmkit.workflows.quickstart import train_quickstart

    trained = train_quickstart(output, seed, minutes, reporter, started)

    reporter.say("\n4/4  evaluation")
    decoder, tokenizer = load_for_generation(str(trained.chat.root), "cpu")
    left = trained.ends - time.monotonic()
    _show_answers(decoder, tokenizer, trained.world.size)
    _show_story(decoder, tokenizer, time.monotonic() + left / 3)
    _show_figures(trained, decoder, tokenizer)
    print(f"\nruns: {trained.stories.root} and {trained.chat.root}, after {clock(time.monotonic() - started)}")
    print("next:")
    for run in (trained.chat, trained.stories):
        print(f"  {suggestion(run.root)}")
    print(f"  slm ui --runs {trained.chat.root.parent}  (a page: chat, curves of the runs, a look inside the model)")
    print(f"  slm train quickstart-grpo model.path={trained.chat.root} data.source={trained.world.source}stories")
    print("  slm train own-text data.source=YOUR.txt output_dir=runs/mine")


def _show_answers(decoder: LanguageModel, tokenizer: SLMTokenizer, world: float) -> None:
    """Print a scene that is not in the training data, with the model's answers to questions about it."""
    from slmkit.data.stories import held_out_scene
    from slmkit.evaluation import ask

    scene, questions = held_out_scene(SCENE, world)
    print(f"\nQuestions about a text that it never read:\n\n  {scene.text}\n")
    for question, answer in zip(scene.questions, ask(decoder, tokenizer, questions).answers):
        note = "" if answer.is_right else f"   (right: {answer.expected})"
        print(f"  you>   {question.question}\n  model> {(answer.given or '').strip()}{note}")


def _show_story(decoder: LanguageModel, tokenizer: SLMTokenizer, until: float) -> None:
    """Print a story, requested as in its corpus, while it is generated."""
    import time

    from slmkit.generation.chat import ChatSession
    from slmkit.generation.sampling_settings import SamplingSettings

    session = ChatSession(decoder, tokenizer, SamplingSettings(temperature=0.3, min_p=0.1, seed=2), max_new_tokens=300)
    print(f"\nA story:\n\n  you>   {STORY}\n  model> ", end="", flush=True)
    for piece in session.reply(STORY):
        print(piece, end="", flush=True)
        if time.monotonic() > until:
            print(" …", end="")
            break
    print()


def _show_figures(trained: Quickstart, decoder: LanguageModel, tokenizer: SLMTokenizer) -> None:
    """Print the validation loss and a perfect model's, the share of questions answered exactly, and what was read."""
    from slmkit.data.shards.reader import TokenShards
    from slmkit.data.stories import held_out_questions
    from slmkit.evaluation import ask

    losses = [line["validation_loss"] for line in trained.stories.metrics.read() if "validation_loss" in line]
    perfect = TokenShards.open(trained.stories.data / "validation").header.perfect_loss
    questions = ask(decoder, tokenizer, held_out_questions(QUESTIONS, world=trained.world.size), trained.ends - 1)
    print("\nThe figures:\n")
    if losses and perfect:
        print(f"  validation loss           {min(losses):.3f} nats per token")
        above = min(losses) / perfect - 1
        print(f"  loss of a perfect model   {perfect:.3f}" + (f", so {above:.1%} above it" if above < 2 else ""))
    right, asked = sum(answer.is_right for answer in questions.answers), len(questions.answers)
    share = f", {questions.share_right:.1%} (± {questions.standard_error:.1%})" if right and asked >= 50 else ""
    print(f"  questions answered        {right} of {asked} right, word for word{share}")

    names = {"primer": "primer", "stories": "stories", "chat": "conversations"}
    shares = ", ".join(f"{share:.0%} of the {names[part]}" for part, share in trained.shares.items())
    print(f"  read                      {shares} of the {trained.world.name} world")
