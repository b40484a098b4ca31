"""`slm serve` and `slm ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from slmkit.cli import options
from slmkit.config import UserError, load_settings

MODELS = "Model directories, runs, adapters, quantized models or OWNER/NAME on the hub; NAME=PATH gives a name."
# Options of both commands.
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
MaxRows = Annotated[int, typer.Option(min=1, help="Texts that a model continues at the same time.")]
Memory = Annotated[float | None, typer.Option(min=0, help="GiB for the KV cache of each model; default: no limit.")]
Runs = Annotated[Path, typer.Option(metavar="FOLDER", help="Runs that the page shows.")]
DATA = "What `slm data prepare` made, for the page to show."
Data = Annotated[Path | None, typer.Option(metavar="FOLDER", exists=True, file_okay=False, help=DATA)]

KEY_FILE = "API keys, one a line; also from SLM_API_KEYS, separated by commas."
HOST = "Listen at this address; 0.0.0.0: at all of this machine, which needs a key."
PREFIX = "Read the common beginning of prompts of a key once."
AT_ONCE = "Requests of a key at once; default: no limit."
A_MINUTE = "Requests of a key in a minute; default: no limit."
DRAIN = "Seconds that open requests get to finish after SIGTERM or Ctrl-C."
SITE = "A site whose pages may call the server, as https://example.org; repeatable."
NAME = "Another name of this server in a URL; repeatable."


def serve(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODELS)],
    host: Annotated[str, typer.Option(help=HOST)] = "127.0.0.1",
    port: Port = 8000,
    key_file: Annotated[Path | None, typer.Option(metavar="FILE", help=KEY_FILE)] = None,
    engine: Annotated[
        Literal["slm", "vllm", "llamacpp"], typer.Option(help="vllm is faster on GPUs; llamacpp reads GGUF files too.")
    ] = "slm",
    device: options.DeviceName = "auto",
    max_rows: MaxRows = 32,
    memory: Memory = None,
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache/--no-prefix-cache", help=PREFIX)] = True,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts of a model that wait; beyond it clients get 429.")] = 256,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="The longest that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help=DRAIN)] = 30.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request; beyond it clients get 413.")] = 2**20,
    requests_per_key: Annotated[int | None, typer.Option("--key-requests", min=1, help=AT_ONCE)] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--key-minute", min=1, help=A_MINUTE)] = None,
    origins: Annotated[list[str] | None, typer.Option("--cors", metavar="ORIGIN", help=SITE)] = None,
    hosts: Annotated[list[str] | None, typer.Option("--allow-host", metavar="NAME", help=NAME)] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Serve the page at / too: chat, runs, a look inside, data.")] = False,
    runs: Runs = Path("runs"),
    data: Data = None,
) -> None:
    """Serve models by the OpenAI API.

    Chat, completions, embeddings; /health and /metrics. On SIGTERM or Ctrl-C it takes nothing new and finishes what is
    open; a second Ctrl-C ends it at once. The exit code is 1 if the engine failed.

    Example: slm serve runs/quickstart/chat
    Example: slm serve chat=runs/book-chat runs/book --port 8080 --ui
    Example: slm serve runs/book-chat --host 0.0.0.0 --key-file keys
    """
    _serve(context.params)


def ui(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]", help=f"{MODELS} Default: the newest run of --runs that learned to chat."),
    ] = None,
    runs: Runs = Path("runs"),
    data: Data = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    port: Port = 8000,
    device: options.DeviceName = "auto",
    max_rows: MaxRows = 32,
    memory: Memory = None,
) -> None:
    """Open a page to chat, watch runs and look inside models.

    It is served to this machine alone; for others: slm serve MODEL --ui --host 0.0.0.0 --key-file FILE.

    Example: slm ui
    Example: slm ui runs/book-chat --runs runs
    """
    from slmkit.workflows.serve import newest_chat_run

    chosen = models or newest_chat_run(runs)
    if chosen and not models:
        print(f"{chosen[0]}: the newest run of {runs} that learned to chat; for another: slm ui MODEL")
    _serve(context.params | {"ui": True, "models": chosen})


def _serve(given: dict[str, Any]) -> None:
    try:
        from slmkit.workflows.serve import ServeSettings, serve_models

        given = {name: value for name, value in given.items() if value is not None}
        code = serve_models(load_settings(ServeSettings, given))
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "h11", "starlette"):
            raise
        raise UserError("the server needs more packages: pip install slmkit[serve]") from None
    raise typer.Exit(code)
