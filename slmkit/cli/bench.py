"""`slm bench data`: how fast this machine is."""

from __future__ import annotations

from typing import Annotated

import typer

from slmkit.cli.help import add_command, new_app

app = new_app("Measure the speed of this machine.", add_completion=False)
app.callback()(lambda: None)  # one command alone would not be a group


def data(
    megabytes: Annotated[float, typer.Option(help="How much built-in text to encode.")] = 20,
    gigabytes: Annotated[
        float, typer.Option(help="Size of the shards to read from; they take no room on the disk.")
    ] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
    peers: Annotated[bool, typer.Option(help="Also measure `datasets` and `litdata`, if they are installed.")] = True,
) -> None:
    """Measure how fast data is prepared and loaded.

    Encoding, preparation, loading, resuming, and the time to the first batch.

    Example: slm bench data --megabytes 5 --gigabytes 1 --rounds 2
    """
    import json

    from slmkit.data.benchmark import measure
    from slmkit.data.benchmark_peers import measure_peers

    for name, result in measure(megabytes, gigabytes, rounds):
        print(f"{name}: {json.dumps(result, ensure_ascii=False)}", flush=True)
    for name, result in measure_peers(megabytes) if peers else ():
        print(f"{name}: {json.dumps(result, ensure_ascii=False)}", flush=True)


add_command(app, "data", data)
