"""`slm chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmkit.generation import ChatSession

HELP = (
    "/reset forgets the conversation, /save FILE keeps it, /load FILE goes on with it, /quit leaves; "
    "Ctrl-C stops an answer."
)
CUT = {"length": " … (cut at {tokens} tokens: --max-new-tokens)", "context": " … (the model's context is full)"}


def chat(
    model: Annotated[str, typer.Argument(help="A model directory, or a run (its best checkpoint).")],
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is wilder.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that together have this share.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this share as likely as the likeliest.")] = 0.05,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="Average with this model's probabilities; may be given several times."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Talk to a model. /reset, /save FILE, /load FILE and /quit are understood; Ctrl-C stops the answer.

    Example: slm chat runs/quickstart/chat
    """
    from slmkit.cli.show import load_model
    from slmkit.generation import ChatSession, SamplingSettings

    decoder, tokenizer = load_model(model, device, others or [])
    settings = SamplingSettings(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    session = ChatSession(decoder, tokenizer, settings, system=system, max_new_tokens=max_new_tokens)
    print(HELP)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not _obey(line, session):
                break
        elif line:
            _answer(session, line)


def _read_line() -> str | None:
    """What the user typed; None at the end of the input. Ctrl-C at the prompt clears the line."""
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _obey(line: str, session: ChatSession) -> bool:
    """Carry out a slash command; False ends the chat."""
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
    """Print the answer as it comes. Ctrl-C ends it and keeps what was said."""
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
