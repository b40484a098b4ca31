"""The formats of `slm export`: how each is written from a model, and which program opens it."""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slmkit.adapt.quantize import LARGEST, rounded_copy
from slmkit.adapt.quantized_files import save_quantized
from slmkit.config import UserError
from slmkit.export import html, onnx
from slmkit.export.compare import Probe, bits_of
from slmkit.export.folders import Mlx, write_mlx, write_ollama, write_space
from slmkit.export.gguf import loader_of, tensors_of, write_gguf
from slmkit.export.gguf_types import KINDS
from slmkit.export.llama_cpp import LlamaCpp
from slmkit.export.runtimes import Loaded, Runtime, Transformers
from slmkit.model.decoder import Decoder
from slmkit.model.families import family_of
from slmkit.model.files.directory import copy_extras, empty_decoder, open_weights, stored_names, write_configs
from slmkit.model.files.stored import StoredTensor, expect_finite, write_shards


@dataclass(frozen=True)
class Request:
    """What `slm export` was asked for. `kind`: how weights are stored, by the target's own name; None: its default."""

    to: str
    output: str | None = None
    kind: str | None = None
    unverified: bool = False
    allow_fallback: bool = False
    overwrite: bool = False
    shard: float = 5.0  # GB of a file of weights, at most


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
        write_shards(folder, shapes, lambda name: _converted(tensors[name], shapes[name][1]), request.shard * 1e9)
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
MLX = {"float32": None, "int8": 8, "int4": 4}
TARGETS = {
    "gguf": Target(
        "*.gguf", GGUF, ("xllamacpp",),
        lambda m, path, kind, request: write_gguf(m.source, path, kind, allow_fallback=request.allow_fallback),
        lambda path, probe: LlamaCpp(path, probe.context),
        suffix=".gguf",
    ),
    "ollama": Target(
        "model.gguf", GGUF, ("xllamacpp",),
        lambda m, path, kind, request: write_ollama(m, path, kind, allow_fallback=request.allow_fallback),
        lambda path, probe: LlamaCpp(path / "model.gguf", probe.context),
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
        "config.json", ("float32", "float16", "bfloat16", *LARGEST), ("transformers",), write_hf,
        lambda path, probe: Transformers(path),
        install="pip install transformers",
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

# How far the weights of a tensor may be from the model's, by their bits: the norm of the difference, relative.
MOST_ROUNDED = {32: 1e-6, 16: 0.02, 8: 0.03, 6: 0.06, 5: 0.12, 4: 0.25, 3: 0.4, 2: 0.7}


def as_stored(path: Path, loaded: Loaded) -> Decoder:
    """A copy of the decoder with the matrices of a GGUF of the model, as they were rounded.

    Raises `UserError` for a matrix that is farther from the model's than its type rounds.
    """
    from gguf import GGUFReader, quants

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    config, rounded = loaded.config, copy.deepcopy(loaded.decoder)
    a, state = rounded.architecture, rounded.state_dict()
    names = stored_names(state, family_of(config.model_type))
    for planned in tensors_of(config, a, loader_of(config, a)):
        tensor = found.get(planned.name)
        if tensor is None or len(planned.shape) == 1:
            continue
        parts = [state[name] for name in names[planned.source]]
        whole = torch.cat(parts)  # [out, in]
        places = planned.change(torch.arange(whole.numel()).view(whole.shape)).flatten()
        values = torch.tensor(quants.dequantize(tensor.data, tensor.tensor_type)).flatten()
        before = whole.flatten()[places]
        type_, error = tensor.tensor_type.name, math.inf
        if len(values) == len(before):
            error = float((values - before).norm() / before.norm().clamp(min=1e-30))
        if not error <= MOST_ROUNDED.get(bits_of(type_), MOST_ROUNDED[2]):
            raise UserError(
                f"{planned.name} in {type_} has other weights than the model: apart by {error:.2g} of their norm"
            )
        whole.view(-1)[places] = values
        for part, fresh in zip(parts, whole.split([len(part) for part in parts])):
            part.copy_(fresh)
    return rounded
