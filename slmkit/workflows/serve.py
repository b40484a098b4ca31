"""What `slm serve` and `slm ui` do: find the models, take the port, load the models, and serve until the end."""

from __future__ import annotations

import functools
import json
import os
import stat
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import FiniteFloat, validate_call

from slmkit.config import UserError
from slmkit.files import read_text
from slmkit.files.find import find_model_directory, learned_conversations, run_of
from slmkit.files.hub import hub_name
from slmkit.serving.doors import Limits

if TYPE_CHECKING:
    import socket

    import torch

    from slmkit.serving.app import Page
    from slmkit.serving.models import ServedModel
    from slmkit.serving.upstream import Engine
    from slmkit.serving.worker import Worker

JSON = dict[str, Any]
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PARALLEL = 4  # requests at once in llama.cpp, which keeps a whole context for each
KEYS = "SLM_API_KEYS"  # environment: keys, separated by commas
LEAST_KEY = 16  # characters
NO_MODEL = "none, since no run has learned to chat: slm ui MODEL serves any model"
ONLY_OWN = ("ui", "device", "memory", "prefix_cache")  # options that other engines do not have


class ServeSettings(Limits):
    """The options of the commands beside the limits. `memory`: GiB for the KV cache of each model; None: no limit."""

    models: list[str]
    host: str = "127.0.0.1"
    port: int = 8000
    engine: Literal["slm", "vllm", "llamacpp"] = "slm"
    device: str = "auto"
    max_rows: int = 32
    memory: FiniteFloat | None = None
    prefix_cache: bool = True
    max_queue: int = 256
    request_seconds: float = 600.0
    drain: float = 30.0
    ui: bool = False
    runs: Path = Path("runs")
    data: Path | None = None
    browser: bool = False
    key_file: Path | None = None


def serve_models(settings: ServeSettings) -> int:
    """Serve until the end; returns the exit code (`server.serve`).

    Raises `UserError` for a missing model, two of one name, unreadable keys, none beyond this machine, and an address
    or port that cannot be had: all before anything is loaded.
    """
    directories, settings.keys = named_models(settings.models, settings.engine), read_keys(settings.key_file)
    ignored = [name for name in ONLY_OWN if getattr(settings, name) != ServeSettings.model_fields[name].default]
    if ignored and settings.engine != "slm":
        option = {"prefix_cache": "no-prefix-cache"}.get(ignored[0], ignored[0])
        raise UserError(f"--{option}: of slm's own engine alone; leave it out with --engine {settings.engine}")
    from slmkit.serving.server import bind, serve

    listening = bind(settings.host, settings.port, has_keys=bool(settings.keys))
    if settings.engine != "slm":
        with tempfile.TemporaryDirectory() as folder:
            return serve_upstream(settings, directories, listening, Path(folder))
    from slmkit.serving.app import create_app
    from slmkit.serving.models import ServedModel
    from slmkit.serving.worker import Worker

    memory = None if settings.memory is None else int(settings.memory * 2**30)
    options = {"max_rows": settings.max_rows, "memory": memory, "reuse": settings.prefix_cache}
    models = {name: ServedModel.load(name, path, settings.device, **options) for name, path in directories.items()}
    for model in models.values():
        check_memory(model, memory)
    share_equal_weights([model.decoder for model in models.values()])
    worker = Worker(list(models.values()), max_queue=settings.max_queue, request_seconds=settings.request_seconds)
    page = page_functions(worker, models, directories, settings.runs, settings.data) if settings.ui else None

    lines = [f"{name}  (context {one.decoder.max_positions:,}, {directories[name]})" for name, one in models.items()]
    worker.start()
    try:
        app, tell = create_app(worker, models, page), functools.partial(tell_ready, settings, listening, lines)
        return serve(app, listening, settings, worker, settings.drain, tell)
    finally:
        worker.stop()


def check_memory(model: ServedModel, memory: int | None) -> None:
    """Warn if a text of the model's whole context does not fit into `memory` bytes. Raises `UserError` if none does."""
    context, pools = model.decoder.max_positions, model.engine.pools
    whole = f"one of its whole context of {context:,} tokens {pools.bytes(context) / 2**30:.3g} GiB"
    if memory is not None and memory < pools.bytes(1):
        least = f"{pools.bytes(1) / 2**30:.3g} GiB for the shortest text"
        raise UserError(f"--memory {memory / 2**30:.3g}: {model.name} needs {least}, and for {whole}")
    if memory is not None and memory < pools.bytes(context):
        what = "so requests that may get longer are refused, such as those without max_tokens"
        print(f"warning: --memory {memory / 2**30:.3g}: {model.name} needs for {whole}, {what}", file=sys.stderr)


def serve_upstream(
    settings: ServeSettings, directories: Mapping[str, Path], listening: socket.socket, folder: Path
) -> int:
    """The same with another engine, for whose files there is `folder`. Raises `UserError` if the engine is not
    installed, or ends while it loads.
    """
    from slmkit.model.files.adapter_directory import is_adapter
    from slmkit.serving.server import serve
    from slmkit.serving.upstream import Upstreams, vllm

    for name, directory in directories.items() if settings.engine == "vllm" else ():
        if is_adapter(directory):
            raise UserError(
                f"{name}: an adapter; for --engine vllm merge it first: slm merge MODEL --adapter {directory}"
            )
    engine = vllm(directories) if settings.engine == "vllm" else llama_cpp(directories, settings.max_rows, folder)
    upstreams = Upstreams(engine, settings.max_rows + settings.max_queue, settings.request_seconds)
    try:
        upstreams.wait_until_ready()
        lines = [f"{name}  ({engine.name}, {directory})" for name, directory in directories.items()]
        tell = functools.partial(tell_ready, settings, listening, lines)
        return serve(upstreams.app, listening, settings, upstreams, settings.drain, tell)
    finally:
        upstreams.stop()


def llama_cpp(models: Mapping[str, Path], most_rows: int, folder: Path) -> Engine:
    """llama.cpp with each model: a GGUF as it is; of a directory one is written into `folder`, with weights of the
    precision that they have. Raises `UserError` if it is not installed, or cannot hold a model.
    """
    from slmkit.export.llama_cpp import KEY, context_of, import_xllamacpp, server_command
    from slmkit.serving.upstream import Engine, llama_cpp_body

    import_xllamacpp()
    commands, beginnings = {}, dict[str, str]()
    for number, (name, path) in enumerate(models.items()):
        if path.is_dir():
            path, beginnings[name] = _as_gguf(path, folder / str(number), name)
        options: dict[str, Any] = {"context": context_of(path), "parallel": min(most_rows, PARALLEL), "alias": name}
        commands[name] = functools.partial(server_command, path, **options)
    return Engine("llamacpp", commands, KEY, functools.partial(llama_cpp_body, beginnings))


def _as_gguf(directory: Path, folder: Path, name: str) -> tuple[Path, str]:
    """The file, and the beginning of each prompt that llama.cpp does not add."""
    from slmkit.export.gguf import write_gguf
    from slmkit.export.gguf_tokenizer import begins_with_bos
    from slmkit.export.runtimes import load

    loaded = load(str(directory), folder / "whole")  # merged and dequantized
    config = json.loads((loaded.source / "config.json").read_text(encoding="utf-8"))
    kind = GGUF_TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "F32")
    print(f"{name}: writing a GGUF of {kind} for llama.cpp", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    write_gguf(loaded.source, folder / "model.gguf", kind)
    tokenizer = loaded.tokenizer
    return folder / "model.gguf", "" if begins_with_bos(tokenizer) else tokenizer.decode(tokenizer.beginning)


def tell_ready(settings: ServeSettings, listening: socket.socket, models: Sequence[str]) -> None:
    """Say where the server is, what it serves, and what to try."""
    from slmkit.serving.server import url_of

    url = url_of(listening)
    print(f"{url}/v1 is ready; Ctrl-C ends it. Models:", *(models or [NO_MODEL]), sep="\n  ")
    if settings.ui and not settings.runs.is_dir():
        print(f"--runs {settings.runs}: no such folder yet, so the page shows no runs")
    print(f"the page: {url}/" if settings.ui else f"try: curl {url}/v1/models", flush=True)
    if settings.browser:
        open_browser(url)


def named_models(models: Sequence[str], engine: str = "slm") -> dict[str, Path]:
    """The directory of each model, by its name: that of its run or folder, the hub's, or what stands before a `=`. For
    llama.cpp also a file.

    Raises `UserError` for a missing model, and two of one name.
    """
    found = dict[str, Path]()
    for model in models:
        name, equals, path = model.partition("=")
        if not equals or "/" in name or Path(model).exists():
            name, path = "", model
        if engine == "llamacpp" and Path(path).is_file():
            directory, name = Path(path), name or Path(path).stem
        else:
            directory = find_model_directory(path)
        if not name:
            on_hub, run = hub_name(path), run_of(directory)
            name = str(on_hub) if on_hub else (run or directory.resolve()).name
        if name in found:
            raise UserError(f"{found[name]} and {directory} are both named {name}: give one as NAME=PATH")
        found[name] = directory
    return found


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file, one a line without comments (`#`), and those of the environment.

    Raises `UserError` for a file that others may read, and for a key that is short or no plain text.
    """
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    if path is not None:
        try:
            lines = [line.partition("#")[0].strip() for line in read_text(path).splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text in UTF-8: write one key a line") from None
        if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise UserError(f"{path}: others on this machine can read or change the keys: chmod 600 {path}")
        if not any(lines):
            raise UserError(f"{path}: no key in it: write one a line")
        keys += filter(None, lines)
    for key in keys:
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"a key of {len(key)} characters: take {LEAST_KEY} or more letters and digits")
    return keys


def share_equal_weights(decoders: Sequence[torch.nn.Module]) -> None:
    """Let equal matrices of several models, such as an adapter's and its base's, be one in memory."""
    import torch

    known: dict[tuple[str, torch.Size, torch.dtype], list[torch.nn.Parameter]] = {}
    for decoder in decoders:
        for name, weight in decoder.named_parameters():
            alike = known.setdefault((name, weight.shape, weight.dtype), [])
            same = next((other for other in alike if torch.equal(other, weight)), None)
            if same is None:
                alike.append(weight)
            else:
                weight.data = same.data


def newest_chat_run(folder: Path) -> list[str]:
    """The run below a folder that learned conversations last, if there is one with a checkpoint."""
    from slmkit.training.logging.list_runs import find_runs

    for run in sorted(find_runs(folder), key=lambda run: run.stat().st_mtime, reverse=True):
        try:
            if learned_conversations(find_model_directory(run)):
                return [str(run)]
        except UserError:  # no checkpoint yet, or an unreadable recipe
            continue
    return []


def page_functions(
    worker: Worker, models: Mapping[str, ServedModel], directories: Mapping[str, Path], runs: Path, data: Path | None
) -> Page:
    """The functions of the page by their names, whose arguments a request gives in its JSON.

    Those that compute with a model do so in the worker's thread.
    """
    from slmkit.evaluation import look as inside
    from slmkit.serving.app import named
    from slmkit.workflows.page_data import PageData

    def about() -> JSON:
        return {
            "models": {
                name: {
                    "context": model.decoder.max_positions,
                    "max_new_tokens": min(model.max_new_tokens, model.decoder.max_positions),
                    "settings": model.settings.model_dump(mode="json"),
                    "chat": model.tokenizer.chat_template is not None,
                    "learned_conversations": learned_conversations(directories[name]),
                }
                for name, model in models.items()
            }
        }

    async def look(model: str, text: str | None = None, messages: list[JSON] | None = None, k: int = 10) -> JSON:
        of = named(models, model)
        return await worker.call(lambda: inside.look(of.decoder, of.tokenizer, text, messages, k))

    async def lens(model: str, ids: list[int]) -> JSON:
        of = named(models, model)
        return await worker.call(lambda: inside.lens(of.decoder, of.tokenizer, ids))

    async def attention(model: str, ids: list[int], layer: int, head: int) -> JSON:
        of = named(models, model)
        return await worker.call(lambda: inside.attention(of.decoder, ids, layer, head))

    functions = PageData(runs, data, {name: model.tokenizer for name, model in models.items()}).functions()
    return functions | {one.__name__: validate_call(one) for one in (about, look, lens, attention)}


def open_browser(url: str) -> None:
    """In a browser with windows; one in the terminal would take it away from the server."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if not isinstance(browser, webbrowser.GenericBrowser) or isinstance(browser, webbrowser.BackgroundBrowser):
        browser.open(url)
