"""Adapter directories in `peft`'s format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slmkit.adapt.adapter_config import AdapterConfig, adapter_config, read_adapter_config
from slmkit.adapt.adapter_format import (
    MAGNITUDE,
    PREFIX,
    A,
    B,
    Update,
    from_peft,
    fuse,
    fused_linears,
    split,
    to_peft,
    update_of,
)
from slmkit.adapt.adapter_whole import ANOTHER, whole_from_disk, whole_to_disk
from slmkit.adapt.lora import DoRALinear, LoRALinear, adapted_linears, expect_plain
from slmkit.adapt.swapping import Linear, linear, linears, matching, replace
from slmkit.config import UserError
from slmkit.hub import hub_name, spelled
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import family_of
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoRASettings
from slmkit.model.files.generation_config import FILE as GENERATION
from slmkit.model.files.generation_config import read_generation_config
from slmkit.model.files.stored import expect_finite, stored_tensors
from slmkit.model.initialization import grow_vocabulary

FINGERPRINT = "base_fingerprint"  # in the metadata of the adapter's tensors, which peft does not read


def fingerprint(decoder: nn.Module) -> str:
    """sha256 (hex) over a model's weights: names, shapes and float32 values, independent of their files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def expect_base(directory: str | Path, *found: Callable[[], str]) -> None:
    """Raises `UserError` if the adapter in `directory` was trained on a model with none of these fingerprints.

    Adapters written by peft have no fingerprint, and are not refused.
    """
    path = Path(directory) / ADAPTER_WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get(FINGERPRINT)
    except (OSError, safetensors.SafetensorError):
        return  # reading its tensors will raise the error
    if wanted and all(one() != wanted for one in found):
        raise UserError(
            f"{path}: it was trained on other weights than this model's (another model, or another step of the same "
            f"run): use it with its own base, {_own_base(Path(directory))}"
        )


def _own_base(directory: Path) -> str:
    """The base's path in an adapter's config, for a message."""
    content = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return str(content.get("base_model_name_or_path"))


def trained_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, under our names."""
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def save_adapter(
    decoder: Decoder,
    config: SLMConfig,
    settings: LoRASettings,
    base: str | Path,
    directory: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the adapter of `decoder` for the model in `base`; `tensors` replace the decoder's own.

    `base_fingerprint` is the `fingerprint` of the model in `base`: on any other model the adapter is refused.

    Raises `UserError` when the disk is full or cannot be written.
    """
    directory, tensors = Path(directory), tensors if tensors is not None else trained_tensors(decoder)
    adapted = adapted_linears(decoder)
    updates: dict[str, Update] = {}
    others: list[str] = []
    for theirs, ours in fused_linears(config, linears(decoder)).items():
        if not any(name in adapted for name in ours):
            others.append(theirs)
            continue
        updates[theirs] = fuse(
            [
                update_of(adapted[name], tensors, name) if name in adapted else linear(decoder, name).weight
                for name in ours
            ]
        )
    shapes = {name: update.shape for name, update in updates.items()}
    whole = whole_to_disk(decoder, config, tensors)
    hub = hub_name(spelled(Path(base)))
    content = adapter_config(hub.name if hub else str(base), settings, shapes, others, family_of(config.model_type))
    content["revision"] = hub.revision if hub else None
    content["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole}) or None
    stored = to_peft(updates) | {f"{PREFIX}{name}": tensor for name, tensor in whole.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (directory / GENERATION).write_text(json.dumps(config.for_generation(), indent=2) + "\n", encoding="utf-8")
        stored = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in stored.items()}
        known = {FINGERPRINT: base_fingerprint} if base_fingerprint else {}
        save_file(stored, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"} | known)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the adapter cannot be written: {error}") from None


def grown_for(directory: str | Path, decoder: Decoder, config: SLMConfig) -> tuple[Decoder, SLMConfig]:
    """The model with its vocabulary extended to the adapter's in `directory`, and a config with its end tokens.

    An adapter with new tokens holds the embedding and the head, which will fill the new rows.
    """
    directory, family = Path(directory), family_of(config.model_type)
    stored = stored_tensors(directory / ADAPTER_WEIGHTS)
    keys = [f"{PREFIX}{family.names[module]}.weight" for module in ("embedding", "head")]
    size = min(stored[key].shape[0] if key in stored else 0 for key in keys)
    if size > config.vocab_size:
        decoder, config = grow_vocabulary(decoder, config, {index: [0] for index in range(config.vocab_size, size)})
    generation = read_generation_config(Path(directory))  # peft writes none
    named: dict[str, Any] = {key: generation[key] for key in ("eos_token_id", "pad_token_id") if key in generation}
    named |= {"generation_config": generation} if generation else {}
    return decoder, config.model_copy(update=named)


def load_adapter(decoder: Decoder, config: SLMConfig, directory: str | Path) -> LoRASettings:
    """Add the adapter in `directory` to the linears of its base model; returns its settings.

    Raises `UserError` for a file that is missing or damaged, and for an adapter of another base.
    """
    expect_plain(decoder)
    directory = Path(directory)
    described, path = read_adapter_config(directory), directory / ADAPTER_WEIGHTS
    updates, whole = _read(path)
    _expect_all(path, decoder, config, described, updates)
    decoder.requires_grad_(False)
    kind = DoRALinear if described.settings.use_dora else LoRALinear
    fused = fused_linears(config, linears(decoder))
    for theirs, tensors in updates.items():
        modules = [linear(decoder, name) for name in fused[theirs]]
        update = _checked(path, theirs, tensors, modules, described)
        for name, module, part in zip(fused[theirs], modules, split(update, [m.out_features for m in modules])):
            if part is not None:
                adapted = kind(module, part.a.size(0), part.scale, described.settings.lora_dropout)
                replace(decoder, name, adapted)
                _fill(adapted, part)
    state = whole_from_disk(path, decoder, config, described, whole)
    decoder.load_state_dict(state, strict=False)
    for name in state:
        decoder.get_parameter(name).requires_grad_(True)
    return described.settings


def read_tensors(decoder: Decoder, config: SLMConfig, directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter, under our names, for a decoder with an adapter of the same settings.

    Raises `UserError` if the shapes differ.
    """
    directory = Path(directory)
    described, path = read_adapter_config(directory), directory / ADAPTER_WEIGHTS
    updates, whole = _read(path)
    adapted = adapted_linears(decoder)
    state: dict[str, Tensor] = {}
    for theirs, ours in fused_linears(config, linears(decoder)).items():
        if theirs not in updates:
            continue
        modules = [linear(decoder, name) for name in ours]
        ranks = [adapted[name].lora_A.size(0) if name in adapted else 0 for name in ours]
        update = _checked(path, theirs, updates[theirs], modules, described)
        for name, part in zip(ours, split(update, [m.out_features for m in modules], ranks)):
            if part is not None:
                state |= {f"{name}.lora_A": part.a, f"{name}.lora_B": part.b}
                state |= {} if part.magnitude is None else {f"{name}.magnitude": part.magnitude}
    state |= whole_from_disk(path, decoder, config, described, whole)
    for name, tensor in trained_tensors(decoder).items():
        if name not in state or state[name].shape != tensor.shape:
            raise UserError(f"{path}: not the adapter of this run: {name!r} is missing or of another shape")
    return state


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    try:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            expect_finite(tensor, f"{name!r}", "the adapter is broken: use another checkpoint")
        return from_peft(tensors)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory holds an adapter's config but no weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); use another checkpoint, or copy it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _expect_all(
    path: Path, decoder: Decoder, config: SLMConfig, described: AdapterConfig, updates: Mapping[str, object]
) -> None:
    """Raises `UserError` unless every target module has an update, and every update a module in the base."""
    there = list(fused_linears(config, linears(decoder)))
    for name in updates:
        if name not in there:
            raise UserError(f"{path}: adapts {name!r}, which its base does not have: {ANOTHER}")
    excluded = [*described.settings.modules_to_save, *described.exclude_modules]
    expected = matching(there, described.settings.target_modules, except_for=excluded)
    expected += [name for name in there if name.endswith(tuple(f".{end}" for end in described.parameters))]
    missing = [name for name in expected if name not in updates]
    if missing and not described.only_some_layers:
        raise UserError(
            f"{path}: no weights for {len(missing)} of the modules in its config, such as {missing[0]!r}: {ANOTHER}"
        )


def _checked(
    path: Path, name: str, tensors: Mapping[str, Tensor], modules: list[Linear], described: AdapterConfig
) -> Update:
    """The update of one of the reference's matrices. Raises `UserError` if its shapes do not fit the base."""
    wanted = {A, B, MAGNITUDE} if described.settings.use_dora else {A, B}
    if tensors.keys() != wanted:
        raise UserError(f"{path}: {name!r} has {', '.join(sorted(tensors))}; expected {', '.join(sorted(wanted))}")
    a, b, magnitude = (tensors[kind].float() if kind in tensors else None for kind in (A, B, MAGNITUDE))
    assert a is not None
    assert b is not None
    rows, columns = sum(module.out_features for module in modules), modules[0].in_features
    if (b.size(0), a.size(1)) != (rows, columns) or a.size(0) != b.size(1):
        raise UserError(
            f"{path}: {name!r} is for a matrix of {b.size(0)} × {a.size(1)}, its base has {rows} × {columns}: {ANOTHER}"
        )
    return Update(a, b, magnitude, described.scale(name, a.size(0)))


def _fill(linear: LoRALinear, update: Update) -> None:
    linear.lora_A.data.copy_(update.a)
    linear.lora_B.data.copy_(update.b)
    if isinstance(linear, DoRALinear) and update.magnitude is not None:
        linear.magnitude.data.copy_(update.magnitude)


@dataclass(frozen=True)
class AdapterFiles:
    """`ModelFiles` that writes and reads an adapter for the model in `base`."""

    config: SLMConfig
    settings: LoRASettings
    base: Path
    base_fingerprint: str

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        return trained_tensors(model)

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        save_adapter(model, self.config, self.settings, self.base, directory, tensors, self.base_fingerprint)

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        expect_base(directory, lambda: self.base_fingerprint)
        return read_tensors(model, self.config, directory)
