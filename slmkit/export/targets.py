"""The formats of `slm export`: how each is written from a model, and which program opens it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from slmkit.adapt.quantize import LARGEST, rounded_copy
from slmkit.adapt.quantized_files import save_quantized
from slmkit.export import html, onnx
from slmkit.export.compare import Probe
from slmkit.export.folders import Mlx, write_mlx, write_ollama, write_space
from slmkit.export.gguf import write_gguf
from slmkit.export.gguf_types import KINDS
from slmkit.export.llama_cpp import LlamaCpp
from slmkit.export.runtimes import Loaded, Runtime, Transformers
from slmkit.model.families import family_of
from slmkit.model.files.directory import copy_extras, empty_decoder, open_weights, write_configs
from slmkit.model.files.stored import StoredTensor, expect_finite, write_shards

SHARD = 5.0  # GB


@dataclass(frozen=True)
class Request:
    """What `slm export` was asked for. `kind`: how weights are stored, by the target's own name; None: its default."""

    to: str
    output: str | None = None
    kind: str | None = None
    unverified: bool = False
    allow_fallback: bool = False
    overwrite: bool = False
    shard: float | None = None  # GB of a file of weights, at most; None: `SHARD`


@dataclass(frozen=True)
class Target:
    """A format: how it is written, what opens it, and how that is installed."""

    pattern: str  # of its file, or of one in its folder
    kinds: tuple[str, ...]  # of weights, the default first
    needs: tuple[str, ...]  # packages and programs that open it; one of several where there is an "or"
    write: Callable[[Loaded, Path, str, Request], object]
    open: Callable[[Path, Probe], Runtime]
    install: str = "pip install slmkit[export]"
    suffix: str = ""  # of its file; empty for a folder
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of `Request`: the kinds that they change

    @property
    def missing(self) -> str:
        """What has to be installed to open it, in words; empty if it is."""
        for need in self.needs:
            if not any(importlib.util.find_spec(name) or shutil.which(name) for name in need.split(" or ")):
                return f"{need} is not installed: {self.install}"
        return ""


def written(target: Target, loaded: Loaded, path: Path, kind: str, request: Request) -> None:
    """Write a target to `path`, a file or a new folder."""
    if not target.suffix:
        path.mkdir()
    target.write(loaded, path, kind, request)


def write_hf(loaded: Loaded, folder: Path, kind: str, request: Request) -> None:
    """A Hugging Face model directory in any precision. Raises `UserError` for a weight that float16 cannot hold."""
    source, config = loaded.source, loaded.config
    if kind in LARGEST:
        save_quantized(rounded_copy(loaded.decoder, kind), config, folder)
    else:
        tensors = open_weights(source, empty_decoder(config), family_of(config.model_type))
        write_configs(config, folder, kind)
        shapes = {name: (tensor.shape, getattr(torch, kind)) for name, tensor in tensors.items()}
        limit = (request.shard or SHARD) * 1e9
        write_shards(folder, shapes, lambda name: _converted(tensors[name], shapes[name][1]), limit)
    copy_extras(source, folder)


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    tensor = stored.read()
    expect_finite(tensor, f"{stored.path}: {stored.name!r}", "the model is broken: use another checkpoint")
    converted = tensor.to(dtype)
    expect_finite(
        converted, f"{stored.name!r} in {dtype}", f"its largest weight is {tensor.abs().max():.3g}: use bfloat16"
    )
    return converted


GGUF = tuple(dict.fromkeys(("F16", *KINDS)))  # the default first
FLOATS = ("float32", "float16", "bfloat16")
MLX = {"float32": None, "int8": 8, "int4": 4}
TARGETS = {
    "gguf": Target(
        "*.gguf", GGUF, ("xllamacpp",),
        lambda m, path, kind, request: write_gguf(m.source, path, kind, allow_fallback=request.allow_fallback),
        lambda path, probe: LlamaCpp(path, probe.context),
        suffix=".gguf", options={"allow_fallback": GGUF},
    ),
    "ollama": Target(
        "model.gguf", GGUF, ("xllamacpp",),
        lambda m, path, kind, request: write_ollama(m, path, kind, allow_fallback=request.allow_fallback),
        lambda path, probe: LlamaCpp(path / "model.gguf", probe.context),
        options={"allow_fallback": GGUF},
    ),
    "html": Target(
        "*.html", html.KINDS, ("playwright", "chromium or chromium-browser or google-chrome"),
        lambda m, path, kind, request: html.write_html(m, path, kind),
        lambda path, probe: html.HtmlPage(path),
        install="pip install playwright, and Chromium",
        suffix=".html",
    ),
    "onnx": Target(
        "*.onnx", onnx.KINDS, ("onnxruntime",),
        lambda m, path, kind, request: onnx.write_onnx(m, path, kind),
        lambda path, probe: onnx.OnnxRuntime(path),
    ),
    "hf": Target(
        "config.json", (*FLOATS, *LARGEST), ("transformers",), write_hf,
        lambda path, probe: Transformers(path),
        install="pip install transformers", options={"shard": FLOATS},
    ),
    "mlx": Target(
        "config.json", (*MLX,), ("mlx_lm",),
        lambda m, path, kind, request: write_mlx(m, path, MLX[kind]),
        lambda path, probe: Mlx(path),
        install="pip install mlx-lm",
    ),
    "space": Target(
        "app.py", ("float32",), ("transformers",),
        lambda m, path, kind, request: write_space(m.source, path),
        lambda path, probe: Transformers(path / "model", "float32"),
        install="pip install transformers",
    ),
}  # fmt: skip
