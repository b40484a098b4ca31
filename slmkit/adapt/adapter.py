"""Adapter directories in `peft`'s format: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.{module}.lora_A.weight  [r, in]      …lora_B.weight  [out, r]      …lora_magnitude_vector  [out]

Where the reference implementation fuses several of our linears into one matrix, their updates are fused too: the A's
are concatenated along r, and the B's are blocks on a diagonal, so that each part gets its own update only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slmkit.adapt.adapter_config import AdapterConfig, adapter_config, read_adapter_config
from slmkit.adapt.lora import DoRALinear, LoRALinear, adapted_linears, expect_plain, keep_base_in, modules_to_save
from slmkit.adapt.swapping import linear, linears, matching, replace
from slmkit.config import UserError
from slmkit.files.hub import hub_name, pinned_name
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import Family, family_of
from slmkit.model.files.adapter_directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoRASettings
from slmkit.model.files.directory import empty_decoder, from_disk, reference_name, stored_names, to_disk
from slmkit.model.files.generation_config import FILE as GENERATION
from slmkit.model.files.generation_config import read_generation_config
from slmkit.model.files.stored import damaged, expect_finite, stored_tensors
from slmkit.model.initialization import grow_vocabulary

PREFIX = "base_model.model."
# Parameters of `LoRALinear` and `DoRALinear` → their names in peft.
IN_PEFT = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
FINGERPRINT = "base_fingerprint"  # in the metadata of the adapter's tensors, which peft does not read
OTHER_MODEL = "it is an adapter of another model"


@dataclass(frozen=True)
class Update:
    """The update of one linear: tensors as in `LoRALinear`, and their scale."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    magnitude: Tensor | None  # [out]
    scale: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names of the parameters of a `LoRALinear`, shapes as above."""
        tensors = {"lora_A": self.a, "lora_B": self.b, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def fingerprint(decoder: nn.Module) -> str:
    """sha256 (hex) over a model's weights: names, shapes and float32 values, independent of their files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def expect_base(directory: str | Path, *found: Callable[[], str | None]) -> None:
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
        base = json.loads(path.with_name(ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UserError(
            f"{path}: it was trained on other weights than this model's (another model, or another step of the same "
            f"run): use it with its own base, {base}"
        )


def trained_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, in any shapes, under our names."""
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class AdapterFiles:
    """`ModelFiles` that writes and reads an adapter for the model in `base`.

    `base_fingerprint` is the `fingerprint` of that model: on any other one the adapter is refused.
    """

    config: SLMConfig
    settings: LoRASettings
    base: Path
    base_fingerprint: str | None = None

    def tensors(self, model: Decoder) -> Mapping[str, Tensor]:
        return trained_tensors(model)

    def write(self, model: Decoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Write the adapter of `model`, with its trained `tensors` [...]. Raises `UserError` if the disk is full."""
        adapted, config = adapted_linears(model), self.config
        updates: dict[str, Update] = {}
        others: list[str] = []
        for theirs, ours in fused_linears(config, model).items():
            if any(name in adapted for name in ours):
                updates[theirs] = fuse(
                    [
                        _update_of(adapted[name], name, tensors) if name in adapted else linear(model, name).weight
                        for name in ours
                    ]
                )
            else:
                others.append(theirs)
        shapes = {name: (update.a.size(0), update.scale) for name, update in updates.items()}
        whole = _whole_to_disk(model, config, tensors)
        hub = hub_name(pinned_name(self.base))
        base = hub.name if hub else str(self.base)
        content = adapter_config(base, self.settings, shapes, others, family_of(config.model_type))
        content["revision"] = hub.revision if hub else None
        content["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole}) or None
        stored = whole | {
            f"{name}.{IN_PEFT[kind]}": tensor
            for name, update in updates.items()
            for kind, tensor in update.tensors.items()
        }
        files = {ADAPTER_CONFIG: json.dumps(content, indent=2, sort_keys=True)}
        files[GENERATION] = json.dumps(config.for_generation(), indent=2)
        metadata = {"format": "pt"} | ({FINGERPRINT: self.base_fingerprint} if self.base_fingerprint else {})
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (directory / name).write_text(text + "\n", encoding="utf-8")
            cloned = {
                PREFIX + name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in stored.items()
            }
            save_file(cloned, directory / ADAPTER_WEIGHTS, metadata=metadata)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{directory}: the adapter cannot be written: {error}") from None

    def read(self, directory: Path, model: Decoder) -> dict[str, Tensor]:
        """The tensors of a saved adapter, under our names, for a model with an adapter of the same settings.

        Raises `UserError` if the shapes differ.
        """
        expect_base(directory, lambda: self.base_fingerprint)
        _, updates, whole = _read(model, self.config, directory)
        state = _under_our_names(updates) | whole
        for name, tensor in trained_tensors(model).items():
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(f"{directory}: not the adapter of this run: {name!r} is missing or of another shape")
        return state


def load_adapter(
    decoder: Decoder, config: SLMConfig, directory: str | Path, base_weights: str = "float32"
) -> tuple[Decoder, SLMConfig, LoRASettings]:
    """The base model with the adapter in `directory`, a config with its end tokens, and its settings.

    An adapter with new tokens holds the embedding and the head, to which the vocabulary is extended. The frozen
    matrices are stored as `base_weights`. Raises `UserError` for a file that is missing or damaged, and for an adapter
    of another base.
    """
    expect_plain(decoder)
    directory = Path(directory)
    decoder, config = _grown_for(directory, decoder, config)
    described, updates, whole = _read(decoder, config, directory)
    settings = described.settings
    if base_weights != "float32":
        keep_base_in(decoder, base_weights, modules_to_save(decoder, config, settings))
    decoder.requires_grad_(False)
    kind = DoRALinear if settings.use_dora else LoRALinear
    for name, update in updates.items():
        replace(decoder, name, kind(linear(decoder, name), update.a.size(0), update.scale, settings.lora_dropout))
    for name, tensor in (_under_our_names(updates) | whole).items():
        decoder.get_parameter(name).requires_grad_(True).data.copy_(tensor)
    return decoder, config, settings


def _grown_for(directory: Path, decoder: Decoder, config: SLMConfig) -> tuple[Decoder, SLMConfig]:
    """The model with its vocabulary extended to the adapter's, whose embedding and head will fill the new rows."""
    family, stored = family_of(config.model_type), stored_tensors(directory / ADAPTER_WEIGHTS)
    keys = [f"{PREFIX}{family.names[module]}.weight" for module in ("embedding", "head")]
    size = min(stored[key].shape[0] if key in stored else 0 for key in keys)
    if size > config.vocab_size:
        decoder, config = grow_vocabulary(decoder, config, {index: [0] for index in range(config.vocab_size, size)})
    generation = read_generation_config(directory)  # peft writes none
    named: dict[str, Any] = {key: generation[key] for key in ("eos_token_id", "pad_token_id") if key in generation}
    named |= {"generation_config": generation} if generation else {}
    return decoder, config.model_copy(update=named)


def _read(
    decoder: Decoder, config: SLMConfig, directory: Path
) -> tuple[AdapterConfig, dict[str, Update], dict[str, Tensor]]:
    """An adapter's config, and under our names the updates of linears and the fully trained tensors.

    Raises `UserError` for a damaged file, and unless the base has each module that the adapter has, and the adapter has
    each that its config names.
    """
    described, path = read_adapter_config(directory), directory / ADAPTER_WEIGHTS
    stored, whole = _stored(path)
    fused, adapted = fused_linears(config, decoder), adapted_linears(decoder)
    _expect_all(path, list(fused), described, stored)
    updates: dict[str, Update] = {}
    for theirs, tensors in stored.items():
        modules = {name: linear(decoder, name) for name in fused[theirs]}
        rows, columns = [module.out_features for module in modules.values()], next(iter(modules.values())).in_features
        update = _checked(path, theirs, tensors, (sum(rows), columns), described)
        ranks = [adapted[name].lora_A.size(0) if name in adapted else 0 for name in modules] if adapted else None
        updates |= {name: part for name, part in zip(modules, split(update, rows, ranks)) if part is not None}
    return described, updates, _whole_from_disk(path, decoder, config, described, whole)


def _stored(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of a file: those of updates by module, and fully trained ones by name, both in the reference's."""
    updates: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory holds an adapter's config but no weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise damaged(path, error) from None
    for key, tensor in tensors.items():
        expect_finite(tensor, f"{path}: {key!r}", "the adapter is broken: use another checkpoint")
        name = key.removeprefix(PREFIX)
        kind = next((kind for kind, ending in IN_PEFT.items() if name.endswith(f".{ending}")), None)
        if name == key or ("lora_" in name and kind is None):
            raise UserError(f"{path}: {key!r} is not a LoRA weight of a linear layer")
        if kind is not None:
            updates.setdefault(name.removesuffix(f".{IN_PEFT[kind]}"), {})[kind] = tensor.float()
        elif ".base_layer." not in name:  # stored by peft for an adapted head, and not needed
            whole[name] = tensor.float()
    return updates, whole


def _expect_all(path: Path, there: Sequence[str], described: AdapterConfig, updates: Mapping[str, object]) -> None:
    """Raises `UserError` unless every target module has an update, and every update a module in the base."""
    for name in updates:
        if name not in there:
            raise UserError(f"{path}: adapts {name!r}, which its base does not have: {OTHER_MODEL}")
    expected = matching(there, described.target_modules, except_for=described.excluded)
    of_weights = tuple(f".{name}" for name in described.target_parameters)
    expected += [name for name in there if f"{name}.weight".endswith(of_weights)]
    missing = [name for name in expected if name not in updates]
    if missing and described.layers_to_transform in (None, []):
        raise UserError(
            f"{path}: no weights for {len(missing)} of the modules in its config, such as {missing[0]!r}: {OTHER_MODEL}"
        )


def _checked(
    path: Path, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], described: AdapterConfig
) -> Update:
    """The update of one of the reference's matrices [out, in]. Raises `UserError` if its shapes do not fit `shape`."""
    wanted = [kind for kind in IN_PEFT if kind != "magnitude" or described.use_dora]
    if tensors.keys() != {*wanted}:
        found, expected = (", ".join(sorted(IN_PEFT[kind] for kind in kinds)) for kinds in (tensors, wanted))
        raise UserError(f"{path}: {name!r} has {found}; expected {expected}")
    a, b = tensors["lora_A"], tensors["lora_B"]
    if (b.size(0), a.size(1)) != shape or a.size(0) != b.size(1):
        raise UserError(
            f"{path}: {name!r} is for a matrix of {b.size(0)} × {a.size(1)}, its base has {shape[0]} × {shape[1]}: "
            f"{OTHER_MODEL}"
        )
    return Update(a, b, tensors.get("magnitude"), described.scale_at(name, a.size(0)))


def _under_our_names(updates: Mapping[str, Update]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": part for name, update in updates.items() for kind, part in update.tensors.items()}


def _update_of(adapted: LoRALinear, name: str, tensors: Mapping[str, Tensor]) -> Update:
    """The update of the linear `name`, from `tensors` under our names."""
    return Update(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], tensors.get(f"{name}.magnitude"), adapted.scale)


# -- matrices that the reference implementation fuses -----------------------------------------------------------------


def fused_linears(config: SLMConfig, decoder: Decoder) -> dict[str, list[str]]:
    """The reference's name of each matrix → our linears that are fused in it, in order."""
    family = family_of(config.model_type)
    fused: dict[str, list[str]] = {}
    for name in linears(decoder):
        fused.setdefault(reference_name(name, family), []).append(name)
    return fused


def fuse(parts: Sequence[Update | Tensor]) -> Update:
    """One update of a fused matrix from its parts' updates; a part without one is given as its weight [out, in]."""
    if len(parts) == 1 and isinstance(parts[0], Update):
        return parts[0]
    updates = [part for part in parts if isinstance(part, Update)]
    scale, magnitude = updates[0].scale, None
    blocks = [
        part.b * (part.scale / scale) if isinstance(part, Update) else part.new_zeros(part.size(0), 0) for part in parts
    ]
    if updates[0].magnitude is not None:
        lengths = [part.magnitude if isinstance(part, Update) else part.norm(dim=1) for part in parts]
        magnitude = torch.cat([length for length in lengths if length is not None])
    return Update(torch.cat([update.a for update in updates]), torch.block_diag(*blocks), magnitude, scale)


def split(update: Update, rows: list[int], ranks: list[int] | None = None) -> list[Update | None]:
    """The update of each part of a fused matrix, with `rows` rows each; None for a part without one.

    `ranks`: rank of each part if known, 0 for one that is not adapted. Else, without block structure in B, every part
    gets all of A.
    """
    if len(rows) == 1:
        return [update]
    b_rows = update.b.split(rows)
    if ranks is not None:
        ends = torch.tensor([0, *ranks]).cumsum(0).tolist()
        columns = [torch.arange(start, end) for start, end in itertools.pairwise(ends)]
    else:
        columns = [part.any(0).nonzero().flatten() for part in b_rows]
        if sum(map(len, columns)) != len(torch.cat(columns).unique()) or not any(map(len, columns)):
            columns = [torch.arange(update.a.size(0))] * len(rows)
    magnitudes = update.magnitude.split(rows) if update.magnitude is not None else [None] * len(rows)
    parts: list[Update | None] = []
    for b, chosen, magnitude in zip(b_rows, columns, magnitudes):
        if ranks is None and magnitude is not None and not len(chosen):
            chosen = torch.zeros(1, dtype=torch.long)  # B is zero there: only the magnitude is learned
        parts.append(Update(update.a[chosen], b[:, chosen], magnitude, update.scale) if len(chosen) else None)
    return parts


# -- fully trained modules, such as embeddings of new tokens ----------------------------------------------------------


def _whole_to_disk(decoder: Decoder, config: SLMConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fully trained modules in `tensors`, under the reference's names.

    A tied embedding is stored twice, also as the head: peft copies the modules that it trains, and so unties them.
    """
    family, state = family_of(config.model_type), decoder.state_dict()
    whole = {
        theirs: to_disk(family, theirs, [tensors[name] if name in tensors else state[name] for name in ours])
        for theirs, ours in stored_names(empty_decoder(config).state_dict(), family).items()
        if any(name in tensors for name in ours)
    }
    if decoder.head is None and "embedding.weight" in tensors:
        whole[f"{family.names['head']}.weight"] = tensors["embedding.weight"]
    return whole


def _whole_from_disk(
    path: Path, decoder: Decoder, config: SLMConfig, described: AdapterConfig, whole: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Fully trained tensors of a file, under our names. Raises `UserError` for those of another model."""
    family, base = family_of(config.model_type), empty_decoder(config).state_dict()
    wanted = stored_names(base, family)
    if decoder.head is None:
        _expect_tied(path, family, described, whole)
    state: dict[str, Tensor] = {}
    for theirs, stored in whole.items():
        if theirs not in wanted:
            raise UserError(f"{path}: holds {theirs!r}, which its base does not have: {OTHER_MODEL}")
        tensor, parts = from_disk(family, theirs, stored), [base[name] for name in wanted[theirs]]
        expected = (sum(map(len, parts)), *parts[0].shape[1:])
        if tensor.shape != expected:
            found = tuple(tensor.shape)
            raise UserError(f"{path}: {theirs!r} has shape {found}, its base's is {expected}: {OTHER_MODEL}")
        pieces = tensor.split([len(part) for part in parts])
        state |= {name: piece.contiguous() for name, piece in zip(wanted[theirs], pieces)}
    return state


def _expect_tied(path: Path, family: Family, described: AdapterConfig, whole: dict[str, Tensor]) -> None:
    """For a base with a tied head: drop the head's copy. Raises `UserError` if it differs from the embedding."""
    embedding, head = (f"{family.names[name]}.weight" for name in ("embedding", "head"))
    copy, is_there = whole.pop(head, None), embedding in whole
    if is_there != (copy is not None or (is_there and described.ensure_weight_tying)):
        raise UserError(
            f"{path}: changes only one of embedding and head, which share a matrix in its base: not supported"
        )
    if copy is not None and not torch.equal(copy, whole[embedding]):
        raise UserError(f"{path}: its embedding and its head differ, but share one matrix in its base: not supported")
