"""`slm generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.options import USUAL, DeviceName, MinP, ModelPath, OtherModels, Penalty, Seed, Temperature, TopK, TopP


def generate(
    model: ModelPath,
    prompt: Annotated[
        str,
        typer.Argument(metavar="[PROMPT]", help="The text to continue; - reads it from standard input; default: none."),
    ] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many tokens; default: what the model advises, or 200."),
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
    import dataclasses
    import sys

    from slmkit.cli.show import load_model
    from slmkit.find import find_model_directory
    from slmkit.generation import SamplingSettings
    from slmkit.model.generation_config import new_tokens, read_generation_config

    directory = find_model_directory(model)
    settings = SamplingSettings.for_model(
        directory, seed, USUAL | {"temperature": 0.8}, temperature=temperature, top_k=top_k,
        top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    decoder, tokenizer = load_model(model, device, others or [])
    from slmkit.generation import stream_completion

    length = len(tokenizer.encode_prompt(prompt))
    most = max_new_tokens or new_tokens(read_generation_config(directory), usual=200, prompt=length)
    for number in range(samples):
        if seed is not None:
            settings = dataclasses.replace(settings, seed=seed + number)
        stream = stream_completion(
            decoder, tokenizer, prompt, settings=settings, max_new_tokens=most, stop=stop or []
        )  # refuses a prompt that is too long, before anything is printed
        if samples > 1:
            print(f"--- sample {number + 1} of {samples}")
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
