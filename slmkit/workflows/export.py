"""`slm export` and `slm verify`: files for other programs, compared with the model before they get their name."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slmkit.adapt.adapter import fingerprint
from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import LARGEST, dequantize_modules, quantized_modules, round_to, to_quantize
from slmkit.adapt.quantized_files import save_quantized
from slmkit.config import UserError, did_you_mean
from slmkit.export.runtimes import Parity, Probe, Runtime, Slmkit, Transformers, bounds_of, compare
from slmkit.files import sync
from slmkit.find import find_model_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import family_of
from slmkit.model.files.adapter_directory import base_of, is_adapter
from slmkit.model.files.directory import empty_decoder, load_decoder, open_weights, save_decoder, write_configs
from slmkit.model.files.stored import DTYPES, StoredTensor, expect_finite, write_shards
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.merge import EXTRA_FILES
from slmkit.workflows.push import card_of
from slmkit.workflows.quantize import DEFAULT_GROUP

PACKAGES = ("slmkit", "torch", "tokenizers", "transformers", "gguf", "xllamacpp", "onnx", "onnxruntime", "playwright")
SHARD = 5.0  # GB of a file of weights, at most
Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `slm export` was asked for. `kind`: how weights are stored, by the target's own name; None: its default."""

    to: str
    output: str | None = None
    kind: str | None = None
    unverified: bool = False
    allow_fallback: bool = False
    overwrite: bool = False
    shard: float = SHARD


@dataclass(frozen=True)
class Exported:
    """What was written: a file or a folder, and its comparison with the model; None if the engine is missing."""

    path: Path
    kind: str
    parity: Parity | None
    record: Path


@dataclass(frozen=True)
class Target:
    """A format: `suffix` of its file, or empty for a folder; kinds of weights, the default first; the package that
    opens it, and how it is installed.
    """

    suffix: str
    kinds: tuple[str, ...]
    engine: str
    extra: str
    write: Callable[[Loaded, Path, str, Request], None]
    open: Callable[[Path, Probe], Runtime]


@dataclass
class Loaded:
    """A model in float32. `source`: a directory of a whole model with these weights, unless `stored` is set: then that
    of the same model, quantized.
    """

    name: str
    decoder: Decoder
    config: SLMConfig
    tokenizer: SLMTokenizer
    source: Path
    stored: Path

    @property
    def runtime(self) -> Slmkit:
        return Slmkit(self.decoder, self.tokenizer, size_of(self.stored))


def size_of(directory: Path) -> int:
    """Bytes of the files of weights in a model directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def export(model: str, request: Request, say: Say = lambda line: None) -> Exported:
    """Write `model` for another program, open the result there, compare, and only then give it its name.

    `model` is a directory, a run, an adapter (which is merged), a quantized model or a name on the hub. Beside the file
    is NAME.parity.json, in a folder parity.json: figures of the comparison, versions, fingerprints. Raises `UserError`
    for a target that exists, a missing engine without `unverified`, a failed check, and what cannot be written;
    nothing has the final name then.
    """
    target = TARGETS.get(request.to)
    if target is None:
        raise UserError(f"--to {request.to}: {did_you_mean(request.to, TARGETS)}")
    kind = request.kind or target.kinds[0]
    directory = find_model_directory(model)
    final = Path(request.output or _default_name(model, request.to, kind, target))
    _expect_free(final, directory, request.overwrite)
    missing = importlib.util.find_spec(target.engine) is None
    if missing and not request.unverified:
        raise UserError(
            f"{target.engine} is not installed, so the result cannot be checked: pip install {target.extra}, or "
            "--unverified to write it all the same"
        )
    with staged(final) as (folder, take):
        say("loading the model")
        loaded = load(model, directory, folder / "whole")
        made = folder / final.name
        if not target.suffix:
            made.mkdir()
        say(f"writing {request.to} {kind}")
        target.write(loaded, made, kind, request)
        record = folder / f"{final.stem}.parity.json" if target.suffix else made / "parity.json"
        parity = None if missing else _checked(target, loaded, made, kind, say)
        if parity is not None and not parity.passed:
            raise UserError(f"{final}: not written, since it differs from the model: {parity.failures[0]}")
        about = about_export(loaded, made, request.to, kind)
        unverified = {"passed": False, "unverified": f"{target.engine} is not installed", **about}
        record.write_text(parity.to_json(**about) if parity else json.dumps(unverified, indent=2) + "\n", "utf-8")
        take(record, made)
    return Exported(final, kind, parity, final.with_name(record.name) if target.suffix else final / record.name)


def _checked(target: Target, loaded: Loaded, made: Path, kind: str, say: Say) -> Parity:
    say("asking slmkit")
    probe = Probe.of(loaded.decoder, loaded.tokenizer)
    say(f"asking {target.engine}")
    with target.open(made, probe) as runtime:
        return compare(loaded.runtime, runtime, probe, bounds_of(kind))


def figures_of(parity: Parity) -> str:
    """The figures of a comparison in one line."""
    ids, chats, predicted, greedy = parity.checks.values()
    return (
        f"the same ids for {ids['compared']:,} texts and {chats['compared']:,} chat prompts; log-probabilities at most "
        f"{predicted['max_abs']:.2g} apart, their mean divergence {predicted['mean_kl']:.2g} nats; the first "
        f"{greedy['equal']} of {greedy['compared']} greedy tokens equal"
    )


def about_export(loaded: Loaded, made: Path, to: str, kind: str) -> dict[str, Any]:
    """What parity.json says beside the figures."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    paths = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": to,
        "kind": kind,
        "model": {
            "name": loaded.name,
            "weights_sha256": fingerprint(loaded.decoder),
            "tokenizer_sha256": loaded.tokenizer.fingerprint,
        },
        "files": {
            str(path.relative_to(made.parent if made.is_file() else made)): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in paths
        },
        "versions": versions,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- names and places -------------------------------------------------------------------------------------------------


def _default_name(model: str, to: str, kind: str, target: Target) -> str:
    name = model.rstrip("/") if Path(model).exists() else Path(model).name.partition("@")[0]
    return f"{name}-{kind}{target.suffix}" if target.suffix else f"{name}-{to}-{kind}"


def _expect_free(final: Path, source: Path, overwrite: bool) -> None:
    """Raises `UserError` for a target that exists, or that may not be replaced."""
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise UserError(f"{final}: exists already: name another --output, or replace it with --overwrite")
    is_ours = final.is_file() or (final / "parity.json").is_file()
    if final.is_symlink() or not is_ours or final.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{final}: --overwrite replaces only what `slm export` wrote: name another --output")


@contextlib.contextmanager
def staged(final: Path) -> Iterator[tuple[Path, Callable[..., None]]]:
    """A folder beside `final` that is deleted at the end, and a function that moves things from it there.

    Folders that killed processes left are deleted too. Raises `UserError` if it cannot be written.
    """
    beside, prefix = final.absolute().parent, f".{final.name}."
    folder = beside / f"{prefix}{os.getpid()}"

    def take(record: Path, made: Path) -> None:
        for path in (made, *(path for path in made.rglob("*"))):
            sync(path)
        if record.parent == folder:
            os.replace(record, beside / record.name)
        old = folder / "old"
        if final.is_dir():
            os.rename(final, old)
        try:
            os.replace(made, final)
        except OSError:
            if old.exists():
                os.rename(old, final)
            raise
        sync(beside)

    try:
        beside.mkdir(parents=True, exist_ok=True)
        for left in beside.glob(f"{prefix}*"):
            if (
                left.name.removeprefix(prefix).isdecimal()
                and not Path("/proc", left.name.removeprefix(prefix)).exists()
            ):
                shutil.rmtree(left)
        folder.mkdir()
        yield folder, take
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load(name: str, directory: Path, scratch: Path) -> Loaded:
    """A model in float32: an adapter merged, quantized weights dequantized, and then written to `scratch`."""
    decoder, config = load_model(directory)
    with_tokenizer = directory
    if is_adapter(directory) and not (directory / "tokenizer.json").is_file():
        with_tokenizer = base_of(directory)
    tokenizer, source = SLMTokenizer.from_pretrained(with_tokenizer), directory
    if is_adapter(directory) or quantized_modules(decoder):
        dequantize_modules(decoder)
        source = scratch
        save_decoder(decoder, config, source)
        copy_extras(with_tokenizer, source)
    return Loaded(name, decoder, config, tokenizer, source, directory)


def copy_extras(source: Path, folder: Path) -> None:
    """The files of a model beside config and weights, except those that `folder` has."""
    for name in EXTRA_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


# -- targets ----------------------------------------------------------------------------------------------------------


def write_hf(loaded: Loaded, folder: Path, kind: str, request: Request) -> None:
    """A Hugging Face model directory in any precision. Raises `UserError` for a weight that float16 cannot hold."""
    source, config = loaded.source, loaded.config
    if kind in LARGEST:
        decoder, _ = load_decoder(source)
        group = DEFAULT_GROUP[kind]
        round_to(decoder, to_quantize(decoder, kind, group, "bfloat16"), group)
        save_quantized(decoder, config, folder)
    else:
        dtype = next((one for one in DTYPES.values() if str(one) == f"torch.{kind}"), None)
        if dtype is None:
            raise UserError(f"--type {kind}: {did_you_mean(kind, TARGETS['hf'].kinds)}")
        tensors = open_weights(source, empty_decoder(config), family_of(config.model_type))
        write_configs(config, folder, kind)
        shapes = {name: (tensor.shape, dtype) for name, tensor in tensors.items()}
        write_shards(folder, shapes, lambda name: _converted(tensors[name], dtype), request.shard * 1e9)
    copy_extras(source, folder)
    (folder / "README.md").write_text(card_of(Path(loaded.name), folder, folder.name), encoding="utf-8")


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    tensor = stored.read()
    expect_finite(tensor, f"{stored.path}: {stored.name!r}", "the model is broken: use another checkpoint")
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise UserError(
            f"{stored.name!r} has a weight of {largest:.3g}, beyond the {torch.finfo(dtype).max:,.0f} of float16: "
            "use bfloat16"
        )
    return tensor.to(dtype)


TARGETS = {
    "hf": Target(
        "", ("float32", "float16", "bfloat16", *LARGEST), "transformers", "transformers", write_hf,
        lambda folder, probe: Transformers(folder),
    ),
}  # fmt: skip
