"""`slm generate`."""

from __future__ import annotations

from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="A model directory, or a run (its best checkpoint).")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; empty lets the model begin.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is wilder.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that together have this share.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this share as likely as the likeliest.")] = 0.05,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="Average with this model's probabilities; may be given several times."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Continue a text.

    Example: slm generate runs/quickstart/chat "Once upon a time" --temperature 0.7 --seed 1
    """
    from slmkit.cli.show import load_model
    from slmkit.generation import SamplingSettings, stream_completion

    decoder, tokenizer = load_model(model, device, others or [])
    settings = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    print(prompt, end="", flush=True)
    for piece in stream_completion(
        decoder, tokenizer, prompt, settings=settings, max_new_tokens=max_new_tokens, stop=stop or []
    ):
        print(piece, end="", flush=True)
    print()
