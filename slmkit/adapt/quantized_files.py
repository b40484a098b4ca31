"""Directories of quantized models, in formats of `compressed-tensors` and `bitsandbytes`, which `transformers` reads.

    int8, int4   {module}.weight_packed  int32 [out, in × bits / 32], codes from 0, the first in the lowest bits
                 {module}.weight_scale  bfloat16 [out, in / group]      {module}.weight_shape  int64 [2]
    nf4          {module}.weight  uint8 [out × in / 2, 1], the first of two codes in the high nibble
                 {module}.weight.absmax  float32 [out × in / group], and what bitsandbytes has besides

All other tensors are bfloat16. `transformers` reads no quantized embedding, and no int8 or int4 of a family whose
matrices it keeps transposed. Such a model has the same tensors and a `quantization_config` of our own, without the
`quant_method` for which `transformers` would fill what it misses with random numbers: it refuses it instead.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from slmkit.adapt.quantize import BITS, Quantized, in_whole_bytes, pack, quantized_like, quantized_modules, unpack
from slmkit.adapt.swapping import HEAD, linears, replace
from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import Family, family_of
from slmkit.model.files.directory import (
    WEIGHTS,
    empty_decoder,
    exactly,
    float_state,
    quantization_of,
    reference_name,
    stored_in,
    stored_names,
    to_disk,
    write_configs,
)  # fmt: skip
from slmkit.model.files.published import OWN_FORMAT
from slmkit.model.files.stored import StoredTensor, expect_finite
from slmkit.model.kernels import GROUPS, NF4, Kind

EMBEDDING = "embedding"
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
# The tensors of a quantized matrix, after the module's name.
PACKED = ("weight_packed", "weight_scale", "weight_shape")
NF4_PARTS = ("weight", "weight.absmax", "weight.quant_map", NF4_STATE)
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")  # for scales that are quantized themselves


# -- writing ----------------------------------------------------------------------------------------------------------


def save_quantized(decoder: Decoder, config: SLMConfig, directory: str | Path) -> None:
    """Write the files of a quantized model, in place as `save_decoder`. Raises `UserError` if the disk is full."""
    directory, family, tensors = Path(directory), family_of(config.model_type), dict[str, Tensor]()
    for theirs, ours in stored_names(empty_decoder(config).state_dict(), family).items():
        modules = [decoder.get_submodule(name.rpartition(".")[0]) for name in ours]
        if theirs.endswith(".weight") and isinstance(modules[0], Quantized):
            parts = to_stored(modules)
            tensors |= {f"{theirs.removesuffix('weight')}{name}": tensor for name, tensor in parts.items()}
        else:
            tensors[theirs] = to_disk(family, theirs, [decoder.get_parameter(name) for name in ours]).bfloat16()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_configs(config, directory, "bfloat16", quantization_config=described(decoder, family))
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the model cannot be written: {error}") from None


def to_stored(modules: Iterable[Any]) -> dict[str, Tensor]:
    """The tensors of one matrix, which `modules` are parts of, along `out`."""
    first = next(iter(modules))
    scales = torch.cat([module.scales for module in modules]).cpu()
    codes = unpack(torch.cat([module.codes for module in modules]).cpu(), scales.size(1), first.kind).flatten(1)
    shape = list(codes.shape)  # [out, in]
    if first.kind == "nf4":
        state = {"quant_type": "nf4", "blocksize": first.group, "dtype": "float32", "shape": shape}
        coded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, 1)
        return dict(zip(NF4_PARTS, (packed, scales.flatten(), NF4.clone(), coded)))
    packed = in_whole_bytes(codes, first.kind).view(torch.int32)
    return dict(zip(PACKED, (packed, scales.bfloat16(), torch.tensor(shape))))


def described(decoder: Decoder, family: Family) -> dict[str, Any]:
    """The `quantization_config` of a decoder: that of `transformers` if it has one for all of its matrices."""
    quantized = {reference_name(name, family): module for name, module in quantized_modules(decoder).items()}
    kept = {reference_name(name, family) for name in (*linears(decoder), HEAD)} - quantized.keys()
    kinds = Counter((module.kind, module.group) for module in quantized.values()).most_common()
    if family.names[EMBEDDING] in quantized:
        why = "transformers reads no quantized embedding"
    elif len(kinds) == 1 and kinds[0][0][0] == "nf4":
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": sorted(kept),
        }  # fmt: skip
    elif family.transposed:
        why = "transformers reads no integers in this family's transposed matrices"
    elif any(kind == "nf4" for (kind, _), _ in kinds):
        why = "transformers reads no nf4 beside other kinds"
    else:
        groups = {}
        for number, ((kind, group), _) in enumerate(kinds):
            names = sorted(name for name, m in quantized.items() if (m.kind, m.group) == (kind, group))
            weights = {
                "num_bits": BITS[kind], "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
                "dynamic": False,
            }  # fmt: skip
            unused = dict.fromkeys(("input_activations", "output_activations"))
            groups[f"group_{number}"] = {"targets": names if number else ["Linear"], "weights": weights} | unused
        return {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": sorted(kept), "kv_cache_scheme": None,
        }  # fmt: skip
    modules = {name: f"{module.kind}, groups of {module.group}" for name, module in sorted(quantized.items())}
    return {"made_by": OWN_FORMAT, "why_not_for_transformers": why, "modules": modules}


# -- reading ----------------------------------------------------------------------------------------------------------


def load_quantized(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read the directory of a quantized model, ours or a published one of the same format, as `load_decoder` does.

    Raises `UserError` as that does, and by name for a matrix of another kind.
    """
    config = SLMConfig.from_pretrained(directory)
    decoder, family = empty_decoder(config), family_of(config.model_type)
    path, tensors = stored_in(directory, decoder, family)
    said = (quantization_of(directory) or {}).get("config_groups") or {}
    sizes = {scheme["weights"].get("group_size") for scheme in said.values()}
    state: dict[str, Tensor] = {}
    for theirs, ours in stored_names(decoder.state_dict(), family).items():
        name = theirs.removesuffix(".weight")
        if f"{name}.weight_packed" not in tensors and f"{name}.weight.absmax" not in tensors:
            continue
        rows = [decoder.get_parameter(one).size(0) for one in ours]
        shape = sum(rows), decoder.get_parameter(ours[0]).size(1)
        codes, scales, kind = _from_stored(path, name, tensors, shape, sizes)
        for one, its_codes, its_scales in zip(ours, codes.split(rows), scales.split(rows)):
            module = one.removesuffix(".weight")
            state |= {f"{module}.codes": its_codes, f"{module}.scales": its_scales}
            empty = quantized_like(decoder.get_submodule(module), its_codes.to("meta"), its_scales.to("meta"), kind)
            replace(decoder, module, empty)
    rest = {name: tensor for name, tensor in decoder.state_dict().items() if name not in state}
    state |= float_state(exactly(path, tensors, rest, family), rest, family, device, is_finite=True)
    decoder.to_empty(device=device)
    decoder.load_state_dict(state)
    return decoder.eval(), config


def _from_stored(
    path: Path, name: str, tensors: dict[str, StoredTensor], shape: tuple[int, int], sizes: Set[int | None]
) -> tuple[Tensor, Tensor, Kind]:
    """Codes, scales and kind of the matrix `name` [out, in]; its tensors are taken out of `tensors`.

    `sizes`: of groups, as config.json says them (None or -1: whole rows); empty if it says none. Raises `UserError` for
    tensors that are missing, damaged, or do not fit `shape` and `sizes`.
    """
    is_nf4 = f"{name}.weight.absmax" in tensors
    wanted = (*NF4_PARTS, *(one for one in NESTED if f"{name}.{one}" in tensors)) if is_nf4 else PACKED
    missing = [f"{name}.{one}" for one in wanted if f"{name}.{one}" not in tensors]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing: not a whole quantized matrix")
    read = {one: tensors.pop(f"{name}.{one}").read() for one in wanted}
    try:
        scale = "weight.nested_absmax" if "weight.nested_absmax" in read else wanted[1]
        if not read[scale].is_floating_point():
            raise ValueError(f"{scale} is {read[scale].dtype}, not of floating-point numbers: use another copy")
        codes, scales, kind = _nf4(read, shape) if is_nf4 else _integers(read, shape)
        group = shape[1] // scales.size(1)
        ours = next((size for size in reversed(GROUPS) if group % size == 0), None)
        if group * scales.size(1) != shape[1] or ours is None:
            raise ValueError(f"groups of {group} are not a multiple of {GROUPS[0]} that divides {shape[1]} columns")
        if sizes and not is_nf4 and not sizes & ({group, None, -1} if group == shape[1] else {group}):
            said = " or ".join(sorted(map(str, sizes)))
            raise ValueError(f"its scales are of groups of {group}, where config.json says group_size {said}")
        scales = scales.repeat_interleave(group // ours, dim=1)
    except (ValueError, ArithmeticError, RuntimeError, LookupError, TypeError) as error:
        raise UserError(f"{path}: {name!r} of {shape[0]} × {shape[1]} cannot be read: {error}") from None
    expect_finite(scales, f"{path}: {name!r}", "the model is broken: use another copy")
    return pack(codes.unflatten(1, (scales.size(1), -1)), kind), scales, kind


def _integers(read: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Kind]:
    packed, scales, said = (read[name] for name in PACKED)
    kind = next((kind for kind, bits in BITS.items() if packed.shape == (shape[0], shape[1] * bits // 32)), None)
    if kind is None or tuple(said.tolist()) != shape or packed.dtype != torch.int32 or scales.size(0) != shape[0]:
        raise ValueError(f"packed {tuple(packed.shape)} {packed.dtype}, scales {tuple(scales.shape)}")
    if not scales.any():
        raise ValueError("weight_scale is zero everywhere, or empty: use another copy")
    bytes_ = packed.contiguous().view(torch.uint8)
    if kind == "int8":
        return (bytes_ ^ 128).view(torch.int8), scales.float(), kind
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1), scales.float(), kind


def _nf4(read: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Kind]:
    packed, scales, table = (read[name] for name in NF4_PARTS[:3])
    state = json.loads(bytes(read[NF4_STATE].tolist()))
    if tuple(state["shape"]) != shape or packed.numel() * 2 != shape[0] * shape[1] or packed.dtype != torch.uint8:
        raise ValueError(f"packed {tuple(packed.shape)} {packed.dtype}, of a matrix of {state['shape']}")
    if not torch.allclose(table, NF4, atol=1e-6):
        raise ValueError("its table is not that of nf4")
    if "weight.nested_absmax" in read:  # double quantization: codes of the scales' distances from their mean
        nested = read["weight.nested_quant_map"][scales.int()]
        blocks = read["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: nested.numel()]
        scales = nested * blocks + state["nested_offset"]
    packed, block = packed.view(shape[0], -1), int(state["blocksize"])
    within = math.gcd(block, shape[1])  # a block may reach into the next row: its parts in one row have the same scale
    scales = scales.float().repeat_interleave(block // within)[: packed.numel() * 2 // within].view(shape[0], -1)
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1), scales, "nf4"
