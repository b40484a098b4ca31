"""A model on disk: a Hugging Face model directory (`config.json`, `generation_config.json`, `model.safetensors`)."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from slmkit.config import UserError
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.families import architecture_of, published_names
from slmkit.model.rope import inverse_frequencies

WEIGHTS = "model.safetensors"


def save_decoder(decoder: Decoder, config: SLMConfig, directory: str | Path) -> None:
    """Write the model's files into `directory`, tensors under the reference implementation's names.

    Files are written in place: for a write that a crash cannot tear, write into a fresh directory and rename it.
    Raises `UserError` when the disk is full or cannot be written.
    """
    directory = Path(directory)
    names = published_names(config)
    tensors = {names[name]: tensor.detach().contiguous() for name, tensor in decoder.state_dict().items()}
    generation = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "do_sample": True}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the model cannot be written: {error}") from None


def load_decoder(directory: str | Path, device: torch.device | str = "cpu") -> tuple[Decoder, SLMConfig]:
    """Read a model directory, in float32 whatever it was stored in. Loading is strict.

    Raises `UserError` for a missing or truncated file, and for a missing, unexpected or misshapen tensor, by name.
    """
    config = SLMConfig.from_pretrained(directory)
    path = Path(directory) / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the directory holds a config but no weights") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); use another checkpoint, or copy it again") from None
    with torch.device("meta"):  # no memory is touched until the real tensors come
        decoder = Decoder(architecture_of(config))
    wanted = {name: published_names(config)[name] for name in decoder.state_dict()}
    if config.tie_word_embeddings:  # some tools store the tied head a second time
        tensors.pop("lm_head.weight", None)
    _check(path, decoder, wanted, tensors)
    state = {name: tensors[published].to(device, torch.float32) for name, published in wanted.items()}
    decoder.to_empty(device=device)
    decoder.load_state_dict(state)
    _refill_rotary(decoder)
    return decoder.eval(), config


def _check(path: Path, decoder: Decoder, wanted: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor the decoder has, no other, and each of the right shape."""
    missing = sorted(set(wanted.values()) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted.values()))
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise UserError(
                f"{path}: {len(names)} {problem} tensors, such as {names[0]!r}: not the model of its config"
            )
    for name, parameter in decoder.state_dict().items():
        found, expected = tuple(tensors[wanted[name]].shape), tuple(parameter.shape)
        if found != expected:
            raise UserError(f"{path}: {wanted[name]!r} has shape {found}, its config says {expected}")


def _refill_rotary(decoder: Decoder) -> None:
    """Buffers that are never stored came empty from the meta device."""
    for rope, table in zip(decoder.ropes, decoder.rotary):
        table.get_buffer("frequencies").copy_(inverse_frequencies(rope, decoder.architecture.head_dim))
