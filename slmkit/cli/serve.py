"""`slm serve` and `slm ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slmkit.cli import options
from slmkit.config import UserError, load_settings

MODELS = "Model directories, runs, adapters, quantized models or OWNER/NAME on the hub; NAME=PATH gives a name."
Models = Annotated[list[str], typer.Argument(metavar="MODEL", help=MODELS)]
SomeModels = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]", help=f"{MODELS} Default: the newest run of --runs that learned to chat."),
]
Host = Annotated[str, typer.Option(help="Listen at this address; 0.0.0.0: at all of this machine, which needs a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="API keys, one a line; also from SLM_API_KEYS, separated by commas."),
]
EngineName = Annotated[str, typer.Option(help="slm; vllm, faster on GPUs; llamacpp, also for GGUF files.")]
MaxRows = Annotated[int, typer.Option(min=1, help="Texts that a model continues at the same time.")]
Memory = Annotated[float | None, typer.Option(min=0, help="GiB for the KV cache of each model; default: no limit.")]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Read the common beginning of prompts of a key once.")
]
MaxQueue = Annotated[int, typer.Option(min=0, help="Texts of a model that wait; beyond it clients get 429.")]
RequestSeconds = Annotated[float, typer.Option(min=0.1, help="The longest that a request may take.")]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that open requests get to finish after SIGTERM or Ctrl-C.")]
MaxBody = Annotated[int, typer.Option(min=1, help="Bytes of a request's body; beyond it clients get 413.")]
AtOnce = Annotated[
    int | None, typer.Option("--key-requests", min=1, help="Requests of a key at once; default: no limit.")
]
PerMinute = Annotated[
    int | None, typer.Option("--key-minute", min=1, help="Requests of a key in a minute; default: no limit.")
]
ALLOWED = "A site whose pages may call the server, as https://example.org; repeatable."
Origins = Annotated[list[str] | None, typer.Option("--cors", metavar="ORIGIN", help=ALLOWED)]
NAMES = "Another name of this server in a URL; repeatable."
Hosts = Annotated[list[str] | None, typer.Option("--allow-host", metavar="NAME", help=NAMES)]
UI = Annotated[bool, typer.Option("--ui", help="Serve the page at / too: chat, runs, a look inside, data.")]
Runs = Annotated[Path, typer.Option(metavar="FOLDER", help="Runs that the page shows.")]
Data = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="What `slm data prepare` made, for the page to show.")
]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")]


def serve(
    context: typer.Context,
    models: Models,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    key_file: KeyFile = None,
    engine: EngineName = "slm",
    device: options.DeviceName = "auto",
    max_rows: MaxRows = 32,
    memory: Memory = None,
    prefix_cache: PrefixCache = True,
    max_queue: MaxQueue = 256,
    request_seconds: RequestSeconds = 600.0,
    drain: Drain = 30.0,
    max_body: MaxBody = 2**20,
    requests_per_key: AtOnce = None,
    requests_per_minute: PerMinute = None,
    origins: Origins = None,
    hosts: Hosts = None,
    ui: UI = False,
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
    models: SomeModels = None,
    runs: Runs = Path("runs"),
    data: Data = None,
    browser: Browser = True,
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
