"""Small models on disk that were one model once, and the merge of some of them, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from slmkit.adapt.merge_recipe import MergeRecipe
from slmkit.config import load_settings
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import WEIGHTS, save_decoder
from slmkit.model.initialization import build_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.workflows.merge import prepare_merge, write_merge

Arrays = dict[str, NDArray[np.float64]]
TOKENIZER = SLMTokenizer(260)


def small(**changes: object) -> SLMConfig:
    shape = {
        "vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.3,
    }  # fmt: skip
    return SLMConfig(**(shape | changes))


def write(directory: Path, decoder: Decoder, config: SLMConfig) -> None:
    save_decoder(decoder, config, directory)
    TOKENIZER.save_pretrained(directory)


def write_family(folder: Path, config: SLMConfig, tunes: int = 3) -> None:
    """`base`, and `tune-0` … that are the base with some of each tensor moved."""
    base = build_decoder(config, seed=0)
    write(folder / "base", base, config)
    for number in range(tunes):
        tuned, generator = build_decoder(config, seed=0), torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        write(folder / f"tune-{number}", tuned, config)


def merge(folder: Path, output: str = "out", **recipe: object) -> Path:
    """The merge of models in `folder`; `models` are names, or entries with weights and densities."""
    models = [{"model": entry} if isinstance(entry, str) else entry for entry in recipe.pop("models")]
    models = [entry | {"model": str(folder / entry["model"])} for entry in models]
    base = {"base_model": str(folder / recipe.pop("base_model"))} if "base_model" in recipe else {}
    content = {"models": models, "output_dir": str(folder / output)} | base | recipe
    return write_merge(prepare_merge(load_settings(MergeRecipe, content)))


def arrays(directory: Path) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in load_file(directory / WEIGHTS).items()}


def bits(directory: Path) -> dict[str, bytes]:
    return {
        name: tensor.flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in load_file(directory / WEIGHTS).items()
    }
