"""A model on disk: a Hugging Face model directory (`config.json`, `generation_config.json`, `model.safetensors`)."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from slmkit.config import UserError
from slmkit.model.architectures import architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import Family, family_of
from slmkit.model.files.stored import SHARDS, WEIGHTS, StoredTensor, expect_finite, stored_tensors

# What a model has beside config and weights: tokenizer and generation settings.
EXTRA_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
# Constants that older versions of transformers stored among the weights.
CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def copy_extras(source: Path, folder: Path) -> None:
    """Copy the files of a model beside config and weights, except those that `folder` has."""
    for name in EXTRA_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def save_decoder(
    decoder: Decoder, config: SLMConfig, directory: str | Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's files into `directory`, tensors under the reference implementation's names.

    `weights` replace the decoder's own tensors, for example if each process holds a shard.

    Files are written in place: for an atomic write, write into a new directory and rename it.
    Raises `UserError` when the disk is full or cannot be written.
    """
    directory = Path(directory)
    family, state = family_of(config.model_type), weights if weights is not None else decoder.state_dict()
    tensors = {
        theirs: to_disk(family, theirs, [state[name] for name in ours])
        for theirs, ours in stored_names(state, family).items()
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_configs(config, directory)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the model cannot be written: {error}") from None


def write_configs(config: SLMConfig, directory: Path, dtype: str = "float32", **more: Any) -> None:
    """Write `config.json` with the keys `more`, and `generation_config.json`; `dtype` is that of the weights."""
    files = {"config.json": config.published(dtype) | more, "generation_config.json": config.for_generation()}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_decoder(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory, in one file or in shards, and convert it to float32. Loading is strict.

    Raises `UserError` for a missing or truncated file, and by name for a tensor that is missing, unexpected, of a
    wrong shape, or has a NaN or infinite value.
    """
    config = SLMConfig.from_pretrained(directory)
    decoder = empty_decoder(config)
    state = read_state(directory, config, device, is_finite=True)
    decoder.to_empty(device=device)
    decoder.load_state_dict(state)
    return decoder.eval(), config


def read_state(
    directory: str | Path, config: SLMConfig, device: torch.device | str = "cpu", is_finite: bool = False
) -> dict[str, Tensor]:
    """The state of a decoder, in float32 and the shapes of its parameters. Raises `UserError` as `load_decoder` does.

    Only with `is_finite` for NaN and infinity: without, runs that diverged can be inspected.
    """
    decoder, family = empty_decoder(config), family_of(config.model_type)
    return float_state(open_weights(directory, decoder, family), decoder.state_dict(), family, device, is_finite)


def float_state(
    tensors: Mapping[str, StoredTensor],
    wanted: Mapping[str, Tensor],
    family: Family,
    device: torch.device | str = "cpu",
    is_finite: bool = False,
) -> dict[str, Tensor]:
    """The tensors of `wanted`, in its shapes and in float32, read from `tensors`, which have names on disk."""
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    state: dict[str, Tensor] = {}
    for theirs, ours in stored_names(shapes, family).items():
        tensor = tensors[theirs].read().to(device, torch.float32)
        if is_finite:
            expect_finite(tensor, f"{tensors[theirs].path}: {theirs!r}", "the model is broken: use another checkpoint")
        parts = from_disk(family, theirs, tensor).split([shapes[name][0] for name in ours])
        state |= {name: part.contiguous() for name, part in zip(ours, parts)}
    return state


def open_weights(directory: str | Path, decoder: Decoder, family: Family) -> dict[str, StoredTensor]:
    """The unread tensors of a model directory, by their names on disk: exactly those of `decoder`.

    Raises `UserError` as `load_decoder` does.
    """
    if quantization_of(directory):
        raise UserError(
            f"{directory}: its weights are quantized, too coarsely to be changed: name the full model that it was made "
            "from"
        )
    path, tensors = stored_in(directory, decoder, family)
    return exactly(path, tensors, decoder.state_dict(), family)


def quantization_of(directory: str | Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model directory; None for one without, or without a readable config.json."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # reading its config will raise the error
        return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return None


def exactly(
    path: Path, tensors: Mapping[str, StoredTensor], state: Mapping[str, Tensor], family: Family
) -> dict[str, StoredTensor]:
    """The `tensors`, which must be those of `state` in names and shapes. Raises `UserError` for another one."""
    wanted = stored_names(state, family)
    for problem, names in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if names:
            raise UserError(
                f"{path}: {len(names)} {problem} tensors, such as {min(names)!r}: not the model of its config"
            )
    for theirs, ours in wanted.items():
        expected = tuple(to_disk(family, theirs, [state[name] for name in ours]).shape)
        found = tensors[theirs].shape
        if found != expected:
            raise UserError(f"{path}: {theirs!r} has shape {found}, its config says {expected}")
    return {name: tensors[name] for name in wanted}


def empty_decoder(config: SLMConfig) -> Decoder:
    """A decoder on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Decoder(architecture_of(config))


def stored_names(state: Iterable[str], family: Family) -> dict[str, list[str]]:
    """The name of each tensor on disk → ours; several where the reference implementation fuses them, in its order."""
    names: dict[str, list[str]] = {}
    for ours in state:
        module, _, parameter = ours.rpartition(".")
        names.setdefault(f"{reference_name(module, family)}.{parameter}", []).append(ours)
    return names


def reference_name(module: str, family: Family) -> str:
    """The reference implementation's name of a module of ours."""
    number = next((part for part in module.split(".") if part.isdigit()), "")
    return family.names[module.replace(f".{number}.", ".{}.") if number else module].format(number)


def to_disk(family: Family, name: str, parts: list[Tensor]) -> Tensor:
    """The tensor stored under the reference's name: `parts` [out, in] or [out], concatenated along `out`."""
    tensor = parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])
    return (tensor.T if name.endswith(family.transposed) else tensor).contiguous()


def from_disk(family: Family, name: str, tensor: Tensor) -> Tensor:
    """A stored tensor in our layout: matrices as [out, in], fused parts concatenated along `out`."""
    return tensor.T if name.endswith(family.transposed) else tensor


def stored_in(directory: str | Path, decoder: Decoder, family: Family) -> tuple[Path, dict[str, StoredTensor]]:
    """All tensors of a directory by the names on disk that `decoder` has, and the file to name in errors."""
    path, tensors = _open(Path(directory))
    _forgive(path, decoder, stored_names(decoder.state_dict(), family), tensors)
    return path, tensors


def _open(directory: Path) -> tuple[Path, dict[str, StoredTensor]]:
    path, index = directory / WEIGHTS, directory / SHARDS
    if path.is_file() or not index.is_file():
        return path, stored_tensors(path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({Path(name).name for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index of shards: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        tensors |= stored_tensors(directory / shard)
    return index, tensors


def _forgive(path: Path, decoder: Decoder, wanted: dict[str, list[str]], tensors: dict[str, StoredTensor]) -> None:
    """Drop constants that some tools store, and add prefixes that they omit from names, in place."""
    for name in [name for name in tensors if name.endswith(CONSTANTS)]:
        del tensors[name]
    embedding = next(theirs for theirs, ours in wanted.items() if ours == ["embedding.weight"])
    prefix, _, bare = embedding.partition(".")
    if bare in tensors and embedding not in tensors:  # a model saved without its head
        for name in [name for name in tensors if name != "lm_head.weight"]:
            tensors[f"{prefix}.{name}"] = tensors.pop(name)
    head = tensors.get("lm_head.weight") if decoder.architecture.tied else None
    if head is not None:
        if embedding in tensors and not torch.equal(head.read(), tensors[embedding].read()):
            raise UserError(
                f"{path}: 'lm_head.weight' is not the embedding, its config says tie_word_embeddings: set that to false"
            )
        del tensors["lm_head.weight"]
