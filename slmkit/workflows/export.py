"""`slm export` and `slm verify`: models for other programs, compared with the original before they get their name."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmkit.adapt.adapter import fingerprint
from slmkit.adapt.quantize import quantized_modules, rounded_copy
from slmkit.config import UserError, did_you_mean
from slmkit.export.compare import (
    EXACT,
    Answers,
    Bounds,
    Parity,
    Probe,
    as_stored,
    bits_of,
    bounds_of,
    compare,
    mean_divergence,
)  # fmt: skip
from slmkit.export.gguf import matrices_of, plan_tensors
from slmkit.export.gguf_types import PlannedTensor
from slmkit.export.llama_cpp import LlamaCpp
from slmkit.export.runtimes import Loaded, Runtime, Slmkit, Transformers, load
from slmkit.export.targets import TARGETS, Request, Target, written
from slmkit.files import file_sha256, staged
from slmkit.files.find import find_model_directory
from slmkit.model.config import SLMConfig
from slmkit.model.families import NOT_IN_TRANSFORMERS
from slmkit.training.run_directory import RunDirectory
from slmkit.workflows.push import card_of

PACKAGES = ("slmkit", "torch", "tokenizers", "transformers", "gguf", "xllamacpp", "onnx", "onnxruntime", "playwright")
STRINGS, CONVERSATIONS = 10_000, 200  # whose ids are compared
ALLOWED = 5  # times the divergence of slmkit's own rounding
Say = Callable[[str], None]


# -- export -----------------------------------------------------------------------------------------------------------


def export(model: str, request: Request, say: Say = lambda line: None) -> tuple[Path, Parity | None]:
    """Write `model` for another program, open the result there, compare, and only then give it its name.

    `model` is a directory, a run, an adapter (which is merged), a quantized model or a name on the hub. Beside a file
    is FILE.parity.json, in a folder parity.json: the figures, versions and fingerprints. Returns where it is, and the
    comparison, None if the engine is missing. Raises `UserError` for a target that exists, a missing engine without
    `unverified`, a failed check, and what cannot be written: then nothing has the final name.
    """
    target, kind, final = expect_possible(model, request)
    try:
        with staged(final.absolute().parent, final.name) as folder:
            say("loading the model")
            loaded, made = load(model, folder / "whole"), folder / "done" / final.name
            say(f"writing {request.to}, {kind}")
            written(target, loaded, made, kind, request)
            if request.to == "hf":
                write_card(Path(model), made)
            parity = None
            if not target.missing:
                say("asking slmkit")
                probe = Probe.of(loaded.decoder, loaded.tokenizer, STRINGS, CONVERSATIONS)
                expected = Answers.of(loaded.runtime, probe)
                with target.open(made, probe) as runtime:
                    say(f"comparing {runtime.name} with slmkit")
                    parity = compared(runtime, kind, loaded, probe, expected)
            if parity and not parity.passed:
                raise UserError(f"{final}: not written, since it differs from the model: {parity.failures[0]}")
            about = about_export(loaded, made, request.to, kind)
            unverified = {"passed": False, "unverified": target.missing, **about}
            content = parity.to_json(**about) if parity else json.dumps(unverified, indent=2) + "\n"
            record_of(made).write_text(content, encoding="utf-8")
            expect_free(final, request, find_model_directory(model).resolve())  # another export may have ended first
    except OSError as error:
        raise UserError(f"{final}: cannot be written: {error}") from None
    return final, parity


def write_card(model: Path, folder: Path) -> None:
    """The model card, and the curve that it shows."""
    (folder / "README.md").write_text(card_of(model, folder, folder.name), encoding="utf-8")
    if (plot := RunDirectory(model).plot).is_file():
        shutil.copyfile(plot, folder / plot.name)


def compared(
    runtime: Runtime, kind: str, loaded: Loaded, probe: Probe, expected: Answers, is_ours: bool = True
) -> Parity:
    """The model and a runtime of its weights in `kind`; of those that we rounded also what is computed with them."""
    bounds = bounds_for(kind, loaded, probe, expected)
    same_weights = None
    read = functools.partial(matrices_of, runtime.gguf) if isinstance(runtime, LlamaCpp) else runtime.stored
    if is_ours and not bounds.greedy and (matrices := [*read(loaded)]):
        rounded = Slmkit(as_stored(matrices, loaded), loaded.tokenizer, 0)
        activations = "int8" if runtime.rounds_activations and bits_of(kind) < 16 else "float16"
        of_activations = bounds_for(activations, loaded, probe, expected)
        same_weights = [rounded.log_probs(*prompt) for prompt in probe.prompts], of_activations
    return compare(loaded.runtime, runtime, probe, bounds, expected, same_weights)


def bounds_for(kind: str, loaded: Loaded, probe: Probe, expected: Answers) -> Bounds:
    """The bounds of a kind of weights, wider for a model that rounding changes more: a divergence of `ALLOWED` times
    that of slmkit's own int4, which becomes a quarter with each further bit.
    """
    bounds = bounds_of(kind)
    if bounds.greedy:
        return bounds
    try:
        rounded = quantized(loaded, "int4")
    except UserError:  # its matrices have other widths
        return bounds
    log_probs = [rounded.log_probs(*prompt) for prompt in probe.prompts]
    usual = mean_divergence(expected.log_probs, log_probs) * 4.0 ** (4 - min(bits_of(kind), 8))
    return replace(bounds, kl=max(bounds.kl, ALLOWED * usual))


def expect_possible(model: str, request: Request) -> tuple[Target, str, Path]:
    """Target, kind of weights, and where the result goes. Raises `UserError` for what cannot be."""
    target = TARGETS.get(request.to)
    if target is None:
        raise UserError(f"--to {request.to}: {did_you_mean(request.to, TARGETS)}")
    wanted = request.kind or target.kinds[0]
    kind = {kind.lower(): kind for kind in target.kinds}.get(wanted.lower())
    if kind is None:
        raise UserError(f"--type {wanted}: {did_you_mean(wanted, target.kinds)}")
    if target.missing and not request.unverified:
        raise UserError(f"{target.missing} (it checks the result); or --unverified, to write without a check")
    local = Path(model).resolve() if Path(model).name in ("", "..") else Path(model)
    name = local if local.exists() else local.name.partition("@")[0]
    final = Path(request.output or f"{name}-{'' if target.suffix else f'{request.to}-'}{kind}{target.suffix}")
    if target.suffix and final.suffix != target.suffix:
        raise UserError(
            f"--output {final}: expected a name with {target.suffix} at its end, such as {final}{target.suffix}"
        )
    expect_free(final, request, find_model_directory(model).resolve())
    for option in ("shard", "allow_fallback"):
        if getattr(request, option) and kind not in target.options.get(option, ()):
            raise UserError(f"--{option.replace('_', '-')}: it changes nothing in {request.to}, {kind}: leave it out")
    return target, kind, final


def expect_free(final: Path, request: Request, source: Path) -> None:
    """Raises `UserError` if something has the final name that must not be replaced."""
    if not os.path.lexists(final):
        return
    if not request.overwrite:
        raise UserError(f"{final}: exists already: name another --output, or replace it with --overwrite")
    is_unsafe = final.is_symlink() or final.resolve() in (source, *source.parents)
    if other := final if is_unsafe else not_exported(final):
        raise UserError(f"{other}: --overwrite replaces only what `slm export` wrote: name another --output")


def not_exported(path: Path) -> Path | None:
    """`path` if no export wrote it, or the first file in it that an export did not write, or that was changed since."""
    try:
        sizes = {name: about["bytes"] for name, about in record(path)["files"].items()}
    except (LookupError, TypeError, AttributeError):
        return path
    files = files_of(path).items()
    return next((one for name, one in files if one != record_of(path) and one.stat().st_size != sizes.get(name)), None)


def files_of(path: Path) -> dict[str, Path]:
    """The files of an export by their names: itself, or those in its folder."""
    if path.is_file():
        return {path.name: path}
    return {one.relative_to(path).as_posix(): one for one in sorted(path.rglob("*")) if not one.is_dir()}


def plan_of(model: str, request: Request) -> list[PlannedTensor]:
    """The tensors of a GGUF with their types and sizes, before it is written; empty for another target.

    Raises `UserError` as `export` does, before the weights are read.
    """
    target, kind, _ = expect_possible(model, request)
    if target.write not in (TARGETS["gguf"].write, TARGETS["ollama"].write):
        return []
    return plan_tensors(SLMConfig.from_pretrained(model), kind, allow_fallback=request.allow_fallback)


def record_of(path: Path) -> Path:
    """Where the comparison of a file or a folder is."""
    return path / "parity.json" if path.is_dir() else path.with_name(f"{path.name}.parity.json")


def record(path: Path) -> dict[str, Any]:
    """What parity.json says of a file or a folder; empty where there is none, or another program's."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(record_of(path).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def about_export(loaded: Loaded, made: Path, to: str, kind: str) -> dict[str, Any]:
    """What parity.json says beside the figures."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    files = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in files_of(made).items()}
    fingerprints = {"weights": fingerprint(loaded.decoder), "tokenizer": loaded.tokenizer.fingerprint}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "target": to, "kind": kind, "model": loaded.name,
        "model_sha256": fingerprints, "files": files, "versions": versions,
    }  # fmt: skip


# -- verify -----------------------------------------------------------------------------------------------------------

MADE = (("gguf", "F32"), ("gguf", "Q8_0"), ("onnx", "fp32"), ("html", "f32"), ("html", "int8"))
Open = Callable[[Probe], Runtime]
# Name, kind of weights, and what makes the files that are opened: it raises `UserError` for what cannot be done here,
# which is no failure of the runtime.
Candidate = tuple[str, str, Callable[[], Open]]


@dataclass(frozen=True)
class Verdict:
    """A row of `slm verify`. Without `parity` nothing was compared, and `problem` says why."""

    runtime: str
    kind: str
    parity: Parity | None
    problem: str = ""
    is_wrong: bool = False  # it differs, or a program refuses what it should open


def verify(model: str, files: Sequence[str] = (), say: Say = lambda line: None) -> list[Verdict]:
    """Compare `model` with itself in every runtime that is installed, or with `files` that were made of it.

    `files`: GGUFs, pages, and folders for ONNX Runtime or transformers, made by any program. Raises `UserError` for a
    model that slmkit cannot read, and for a file of another kind.
    """
    with tempfile.TemporaryDirectory(prefix="slm-verify-") as scratch:
        given = [_given(file) for file in files]
        say("loading the model")
        loaded = load(model, Path(scratch, "whole"))
        reference, probe = loaded.runtime, Probe.of(loaded.decoder, loaded.tokenizer, STRINGS, CONVERSATIONS)
        say("asking slmkit")
        expected = Answers.of(reference, probe)
        verdicts = [Verdict("slmkit", "float32", compare(reference, reference, probe, EXACT, expected))]
        for name, kind, make in given or _installed(loaded, Path(scratch)):
            say(f"comparing {name} {kind}")
            opened = None
            try:
                opened = make()
                with opened(probe) as runtime:
                    # Others may round not to nearest, as GPTQ does, in formats that slmkit does not read.
                    is_ours = not isinstance(runtime, Transformers) or bool(record(runtime.directory))
                    parity = compared(runtime, kind, loaded, probe, expected, is_ours)
                verdicts.append(Verdict(name, kind, parity, "; ".join(parity.failures), not parity.passed))
            except UserError as error:
                verdicts.append(Verdict(name, kind, None, str(error), is_wrong=opened is not None))
    return verdicts


def _installed(loaded: Loaded, scratch: Path) -> Iterator[Candidate]:
    """Every runtime, whether it is installed or not."""
    for kind in ("int8", "int4"):
        yield "slmkit", kind, functools.partial(_rounded, loaded, kind)
    yield "transformers", "float32", functools.partial(_in_transformers, loaded)
    for to, kind in MADE:
        yield to, kind, functools.partial(_made, loaded, to, kind, scratch / f"{to}-{kind}{TARGETS[to].suffix}")


def _made(loaded: Loaded, to: str, kind: str, path: Path) -> Open:
    if TARGETS[to].missing:
        raise UserError(TARGETS[to].missing)
    written(TARGETS[to], loaded, path, kind, Request(to))
    return functools.partial(TARGETS[to].open, path)


def _rounded(loaded: Loaded, kind: str) -> Open:
    runtime = quantized(loaded, kind)
    return lambda probe: runtime


def _in_transformers(loaded: Loaded) -> Open:
    model_type = loaded.config.model_type
    if model_type in NOT_IN_TRANSFORMERS or TARGETS["hf"].missing:
        raise UserError(TARGETS["hf"].missing or f"transformers has no {model_type}")
    return lambda probe: Transformers(loaded.source, "float32")


def quantized(loaded: Loaded, kind: str) -> Runtime:
    """The model in slmkit itself, rounded to the nearest codes."""
    decoder = rounded_copy(loaded.decoder, kind)
    wide = sum(parameter.numel() * 2 for parameter in decoder.parameters())
    size = wide + sum(one.codes.nbytes + one.scales.nbytes // 2 for one in quantized_modules(decoder).values())
    return Slmkit(decoder, loaded.tokenizer, size)


def _given(file: str) -> Candidate:
    path = Path(file)
    if not path.exists():
        raise UserError(f"{file}: no such file")
    wrote = record(path).get("target")  # of a folder with config.json it says for which program it is
    for to in sorted(TARGETS, key=lambda name: name != wrote):
        target = TARGETS[to]
        found = [path] if path.is_file() and path.match(target.pattern) else sorted(path.glob(target.pattern))
        if found:
            break
    else:
        raise UserError(f"{file}: expected a .gguf, a .html, or a folder with an .onnx or with config.json")
    opened = found[0] if target.suffix else path
    return file, kind_of(opened, to), lambda: functools.partial(target.open, opened)


def kind_of(path: Path, to: str) -> str:
    """How the weights of a file are stored, by its own words or those of its parity.json; else the target's default."""
    if kind := record(path).get("kind"):
        return str(kind)
    with contextlib.suppress(OSError, ValueError, LookupError, ImportError):  # the program that opens it will say why
        if to == "gguf":
            from gguf import GGUFReader, LlamaFileType

            field = GGUFReader(path).fields["general.file_type"]
            return LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if to == "html":
            return re.findall(r'"kind": "(\w+)", "parameters"', path.read_text(encoding="utf-8"))[0]
        if to == "hf":
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return "int4" if config.get("quantization_config") else config.get("dtype") or config["torch_dtype"]
    return TARGETS[to].kinds[0]
