"""`slm chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmkit.cli.options import USUAL, DeviceName, MinP, ModelPath, OtherModels, Penalty, Seed, Temperature, TopK, TopP

if TYPE_CHECKING:
    from slmkit.generation.chat import ChatSession
    from slmkit.generation.ensemble import LanguageModel
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.tokenizer import SLMTokenizer

HELP = (
    "/reset forgets the conversation, /save FILE keeps it, /load FILE goes on with it, /quit leaves; "
    "Ctrl-C stops an answer."
)
CUT = {"length": " … (cut at {tokens} tokens: --max-new-tokens)", "context": " … (the model's context is full)"}


def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="A system message for the whole conversation.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop an answer after this many tokens; default: what the model advises, or 300."),
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    others: OtherModels = None,
    device: DeviceName = "auto",
) -> None:
    """Talk to a model.

    /reset begins anew, /save FILE and /load FILE keep a conversation, /quit ends. Ctrl-C stops an answer.

    Example: slm chat runs/quickstart/chat
    """
    decoder, tokenizer, settings, advice = _open(
        model, others, device, seed, USUAL | {"temperature": 0.6}, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    from slmkit.find import learned_conversations
    from slmkit.generation.chat import ChatSession
    from slmkit.model.files.generation_config import new_tokens

    if learned_conversations(model) is False:
        print(f"note: {model} was trained on plain text alone and never saw a conversation, so it will hardly answer.")
        print(f"To teach it: slm train own-chat model.path={model} data.source=YOUR_CHATS.jsonl")
    most = max_new_tokens or new_tokens(advice, usual=300)
    session = ChatSession(decoder, tokenizer, settings, system=system, max_new_tokens=most)
    print(HELP)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not _obey(line, session):
                break
        elif line:
            _answer(session, line)


def _open(
    model: str, others: list[str] | None, device: str, seed: int | None, usual: dict[str, float], **given: Any
) -> tuple[LanguageModel, SLMTokenizer, SamplingSettings, dict[str, Any]]:
    """The model with its tokenizer, how to sample from it, and its `generation_config.json`."""
    from slmkit.cli.show import load_for_generation
    from slmkit.find import find_model_directory
    from slmkit.generation.sampling_settings import SamplingSettings
    from slmkit.model.files.generation_config import read_generation_config

    directory = find_model_directory(model)
    settings = SamplingSettings.for_model(directory, seed, usual, **given)  # before the model is loaded
    return *load_for_generation(model, device, others or []), settings, read_generation_config(directory)


def _read_line() -> str | None:
    """The user's line; None at the end of the input. Ctrl-C at the prompt clears the line."""
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _obey(line: str, session: ChatSession) -> bool:
    """Run a slash command; False ends the chat."""
    from slmkit.config import UserError

    command, _, argument = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        session.reset()
        print("(forgotten)")
    elif command in ("/save", "/load"):
        path = argument.strip() or "chat.json"
        try:
            (session.save if command == "/save" else session.load)(path)
            print(f"({'saved to' if command == '/save' else 'going on with'} {path})")
        except UserError as error:
            print(f"({error})")
    else:
        print(f"(unknown command {command}: {HELP})")
    return True


def _answer(session: ChatSession, line: str) -> None:
    """Print the answer while it is generated. Ctrl-C ends it and keeps the text so far."""
    from slmkit.config import UserError

    pieces, forgotten = session.reply(line), session.forgotten
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print(CUT.get(session.finish_reason or "", "").format(tokens=session.max_new_tokens), end="")
        if session.forgotten > forgotten:
            print(f"\n({session.forgotten} messages no longer fit the context and are forgotten)", end="")
    except KeyboardInterrupt:
        pieces.close()
        print(" (stopped)", end="")
    except UserError as error:
        print(f"({error})", end="")
    print()


def generate(
    model: ModelPath,
    prompt: Annotated[
        str,
        typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads it from standard input; default: none."),
    ] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many tokens; default: what the model advises, or 200.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many continuations to write.")] = 1,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    seed: Seed = None,
    others: OtherModels = None,
    device: DeviceName = "auto",
) -> None:
    """Continue a text.

    Example: slm generate runs/quickstart/stories "Once there was a fox" --seed 1
    Example: slm generate runs/quickstart/stories -n 3 --max-new-tokens 50
    Example: echo "Once there was a fox" | slm generate runs/quickstart/stories -
    """
    import sys

    decoder, tokenizer, settings, advice = _open(
        model, others, device, seed, USUAL, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    from slmkit.generation.generator import TextStream
    from slmkit.model.files.generation_config import new_tokens

    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    length = len(tokenizer.encode_prompt(prompt))
    most = max_new_tokens or new_tokens(advice, usual=200, prompt=length)
    for number in range(samples):
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed + number})
        stream = TextStream(
            decoder, tokenizer, prompt, settings=settings, max_new_tokens=most, stop=stop or []
        )  # raises for a prompt that is too long, before anything is printed
        if samples > 1:
            print(f"--- sample {number + 1} of {samples}")
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        if max_new_tokens and stream.finish_reason == "context":
            print(f"the model's context of {decoder.max_positions} tokens ends the text here", file=sys.stderr)
