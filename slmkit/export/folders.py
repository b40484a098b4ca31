"""Folders for other programs, written from a model directory: Ollama, MLX, and a Space of Hugging Face."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from slmkit.config import UserError, importing
from slmkit.export.gguf import (
    CAPPED_LOGITS,
    CAPPED_SCORES,
    GELU,
    NO_ATTENTION_BIAS,
    NO_WINDOWS,
    SILU,
    TIED,
    WHOLE_HEADS,
    Need,
    expect_held,
    write_gguf,
)
from slmkit.export.llama_cpp import fields_of
from slmkit.export.runtimes import Loaded, Stored, Transformers, codes_in
from slmkit.model.architectures import Architecture, architecture_of
from slmkit.model.config import SLMConfig
from slmkit.model.families import NOT_IN_TRANSFORMERS, family_of
from slmkit.model.files.directory import WEIGHTS, stored_names, write_configs
from slmkit.model.files.generation_config import read_generation_config
from slmkit.model.rope import Linear, Llama3
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat_pieces import ChatPieces, chat_pieces

# -- Ollama -----------------------------------------------------------------------------------------------------------

GGUF = "model.gguf"
# Ollama's names of sampling settings, and the neutral values, in place of Ollama's own defaults.
PARAMETERS = {
    "temperature": ("temperature", 1), "top_k": ("top_k", 0), "top_p": ("top_p", 1), "min_p": ("min_p", 0),
    "typical_p": ("typical_p", 1), "repetition_penalty": ("repeat_penalty", 1), "max_new_tokens": ("num_predict", None),
}  # fmt: skip
LONGEST_CONTEXT = 8_192  # tokens that a Modelfile asks for: the cache of a longer context takes gigabytes
NO_SYSTEM = '{{ call "the chat template of this model has no system message" }}'  # an error: there is no such function


def write_ollama(loaded: Loaded, folder: Path, kind: str, *, allow_fallback: bool = False) -> None:
    """A GGUF file of a kind of weights and its `Modelfile` in `folder`, for `ollama create NAME -f Modelfile`.

    Raises `UserError` as `write_gguf` does, for a chat template that Ollama's language cannot say, and for an end token
    that is ordinary text and is not named in the GGUF file.
    """
    write_gguf(loaded.source, folder / GGUF, kind, allow_fallback=allow_fallback)
    tokenizer, advice, keys = loaded.tokenizer, read_generation_config(loaded.source), _numbers_in(folder / GGUF)
    lines = [f"FROM ./{GGUF}", ""]
    if tokenizer.chat_template is None:
        template = "{{ .Prompt }}"
    else:
        pieces = chat_pieces(tokenizer)
        if pieces.dated:
            lines.append("# The template below has the date of the day when this file was written.")
        if pieces.trimmed:
            lines.append("# Unlike the model's chat template, it keeps white space at the ends of messages.")
        begins = tokenizer.bos_token or "" if keys.get("add_bos_token") else ""  # llama.cpp writes it then
        template = go_template(pieces, begins)
    lines += [f'TEMPLATE """{template}"""', ""]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops(tokenizer, keys)]
    lines += [f"PARAMETER num_ctx {min(loaded.config.max_position_embeddings, LONGEST_CONTEXT)}"]
    given = {"temperature": 0} if advice.get("do_sample") is False else advice
    for theirs, (ours, neutral) in PARAMETERS.items():
        value = given.get(theirs) if given.get(theirs) is not None else neutral
        lines += [] if value is None else [f"PARAMETER {ours} {value}"]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(pieces: ChatPieces, begins: str = "") -> str:
    """The chat template in Go's template language, as Ollama runs it; `begins` at its start is left to llama.cpp."""
    between = {
        key: _literal(text.removeprefix(begins) if key[0] == ">" else text) for key, text in pieces.between.items()
    }
    system = between[">system"] + "{{ .Content }}" if ">system" in between else NO_SYSTEM
    after_system = '{{ else if eq $before "system" }}' + between["system>user"] if ">system" in between else ""
    # Ollama takes from these what surrounds the model's reasoning, and then leaves it out of later prompts.
    thinking = "{{ if false }}<think>{{ .Thinking }}</think>{{ end }}" if pieces.drops_thinking else ""
    return (
        '{{ $before := "" }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}' + system + '{{ else if eq .Role "user" }}'
        '{{ if eq $before "assistant" }}' + between["assistant>user"] + after_system + "{{ else }}" + between[">user"] +
        '{{ end }}{{ .Content }}{{ else if eq .Role "assistant" }}' + between["user>assistant"] + thinking +
        "{{ .Content }}{{ end }}{{ $before = .Role }}{{ end }}" + between["user>"]
    )  # fmt: skip


def stops(tokenizer: SLMTokenizer, keys: Mapping[str, Any]) -> list[str]:
    """The spellings of the special tokens that end an answer. Texts are compared with them, ids with those in `keys`.

    A token that an answer may also spell (`</s>` of HTML) is left to its id. Raises `UserError` for one without.
    """
    spelled = {index: text for text, index in (tokenizer.added_words | tokenizer.special_tokens).items()}
    by_id = {keys.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom")}
    found = []
    for index in sorted(tokenizer.stop_token_ids):
        text = spelled.get(index, "")
        if text and not re.fullmatch(r"</?[a-z]>|\s*\w*\s*", text):
            found.append(text)
        elif index not in by_id:
            raise UserError(
                f"generation_config.json ends texts at {tokenizer.decode(index)!r} (id {index}), which Ollama would "
                "find inside of other text too: take it out of eos_token_id"
            )
    return found


def _literal(text: str) -> str:
    """Text as a Go template writes it. A Modelfile drops what cannot be printed, and ends at three quotes."""
    unsafe = r'\{\{|"""|[^\S\n ]|[^\x20-\x7e\n\w\s]'
    return re.sub(unsafe, lambda match: "{{ " + json.dumps(match[0]) + " }}", text)


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _numbers_in(gguf: Path) -> dict[str, Any]:
    """The numbers and switches of the tokenizer in a GGUF file, without `tokenizer.ggml.`"""
    fields, prefix = fields_of(gguf), "tokenizer.ggml."
    wanted = ("eos_token_id", "eot_token_id", "eom_token_id", "add_bos_token")
    return {name: fields[prefix + name].contents() for name in wanted if prefix + name in fields}


# -- MLX --------------------------------------------------------------------------------------------------------------

GROUPS = (64, 32)  # weights with one scale


def _full_every(a: Architecture) -> int:
    """Every how manyeth layer has no window, by the first of them; 0: none."""
    return next((i for i, layer in enumerate(a.layers, 1) if layer.window is None), 0)


def _scaled_by(kinds: tuple[type, ...], a: Architecture, windowed: bool | None = None) -> bool:
    """Whether RoPE has no scaling but of these kinds, in all layers, or in those with a window or without."""
    layers = [layer for layer in a.layers if windowed is None or (layer.window is not None) == windowed]
    return all(layer.rope is None or isinstance(layer.rope.scaling, (*kinds, type(None))) for layer in layers)


# What mlx-lm's code of each family always computes.
ROPE = Need("rope_type", partial(_scaled_by, (Linear, Llama3)), "default, linear or llama3")
PLAIN = Need("rope_type", partial(_scaled_by, ()), "default")
PLAIN_WINDOWS = Need("rope_type", partial(_scaled_by, (), windowed=True), "default in layers with a window")
ONE_BASE = Need("rope_theta", lambda a: len({layer.rope.theta for layer in a.layers if layer.rope}) == 1, "one for all")
A_FULL_LAYER = Need("layer_types", lambda a: _full_every(a) > 0, "a layer without window")
BOTH_KINDS = Need("layer_types", lambda a: len({layer.window for layer in a.layers}) == 2, "layers of both kinds")
PERIODIC = Need(
    "layer_types",
    lambda a: all((i % max(1, _full_every(a)) == 0) == (layer.window is None) for i, layer in enumerate(a.layers, 1)),
    "every n-th layer without window",
)
IN_MLX = {
    "gpt2": (GELU, TIED, Need("intermediate_size", lambda a: a.mlp_width == 4 * a.width, "4 × hidden_size")),
    "llama": (SILU, ROPE),
    "mistral": (SILU, ROPE, NO_WINDOWS),
    "qwen2": (SILU, ROPE, NO_WINDOWS, WHOLE_HEADS),
    "qwen3": (SILU, ROPE, NO_WINDOWS, NO_ATTENTION_BIAS),
    "smollm3": (SILU, ROPE, A_FULL_LAYER),
    "olmo2": (SILU, ROPE),
    "olmo3": (SILU, ROPE, PLAIN_WINDOWS, ONE_BASE, BOTH_KINDS),
    "gemma2": (GELU, PLAIN, NO_WINDOWS, NO_ATTENTION_BIAS, TIED, CAPPED_SCORES, CAPPED_LOGITS),
    "gemma3_text": (
        GELU, ROPE, PLAIN_WINDOWS, A_FULL_LAYER, PERIODIC, NO_ATTENTION_BIAS,
        Need("final_logit_softcapping", lambda a: a.logit_cap is None, "null"),
    ),
}  # fmt: skip


def expect_mlx(config: SLMConfig) -> Architecture:
    """The architecture. Raises `UserError` that names the family or setting with which mlx-lm would differ."""
    if config.model_type not in IN_MLX:
        raise UserError(f"mlx-lm does not run {config.model_type}: it runs {', '.join(IN_MLX)}; export to gguf")
    a = architecture_of(config)
    expect_held(IN_MLX[config.model_type], config, a, f"mlx-lm's {config.model_type}")
    return a


def write_mlx(loaded: Loaded, folder: Path, bits: int | None = None) -> None:
    """The folder that `mlx_lm.load` reads: weights in float32, or bfloat16 with matrices of 2, 4 or 8 bits.

    Codes are those of `mlx.core.quantize`. Raises `UserError` for a family or a setting that mlx-lm does not have.
    """
    config, family, state = loaded.config, family_of(loaded.config.model_type), loaded.decoder.state_dict()
    more: dict[str, Any] = {"sliding_window_pattern": _full_every(expect_mlx(config))}  # only Gemma 3 reads it
    whole = {
        theirs.replace("transformer.", "model."): torch.cat([state[name] for name in ours])  # matrices as [out, in]
        for theirs, ours in stored_names(state, family).items()
    }
    tensors = {name: tensor.contiguous() for name, tensor in whole.items()} if bits is None else {}
    if bits is not None:
        matrices = [tensor for tensor in whole.values() if tensor.ndim == 2]
        group = max(GROUPS, key=lambda size: sum(one.numel() for one in matrices if one.size(1) % size == 0))
        more |= {key: {"group_size": group, "bits": bits} for key in ("quantization", "quantization_config")}
        for name, tensor in whole.items():
            if tensor.ndim == 2 and tensor.size(1) % group == 0:
                parts = quantized(tensor.bfloat16(), bits, group)
                tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            else:
                tensors[name] = tensor.bfloat16()
    write_configs(config, folder, "float32" if bits is None else "bfloat16", **more)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})
    loaded.tokenizer.save_pretrained(folder)


def quantized(weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """weight [out, in] → codes `weight` uint32 [out, in × bits / 32], `scales` and `biases` [out, in / group].

    w ≈ scale × code + bias; the value of the largest magnitude and zero are among the values of codes.
    """
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    most = 2**bits - 1
    scales = ((high - low) / most).clamp(min=1e-7)
    is_low = low.abs() > high.abs()
    scales, edge = torch.where(is_low, scales, -scales), torch.where(is_low, low, high)
    steps = (edge / scales).round()
    scales = torch.where(steps != 0, edge / steps, scales)
    biases = torch.where(steps != 0, edge, 0)
    codes = ((groups - biases) / scales).round().clamp(0, most).to(torch.int64).flatten(1)
    places = torch.arange(0, 32, bits)
    packed = (codes.unflatten(1, (-1, 32 // bits)) << places).sum(-1)  # the first code in the lowest bits
    return {
        "weight": packed.to(torch.uint32),
        "scales": scales[..., 0].to(weight.dtype),
        "biases": biases[..., 0].to(weight.dtype),
    }


class Mlx(Transformers):
    """mlx-lm, which reads text as transformers does. Raises `UserError` if it is not installed."""

    name = "mlx-lm"

    def __init__(self, folder: Path) -> None:
        with importing("mlx-lm is not installed: pip install mlx-lm"):
            import mlx_lm
        self.directory, self.size = folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._model, tokenizer, *_ = mlx_lm.load(str(folder))
        self._tokenizer = tokenizer._tokenizer

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        import mlx.core as mx

        places = mx.array([length - 1 for length in lengths])
        logits = self._model(mx.array([[*ids]]))[0, places].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        fresh, cache, found = [*ids], make_prompt_cache(self._model), list[int]()
        for _ in range(count):
            fresh = [int(mx.argmax(self._model(mx.array([fresh]), cache=cache)[0, -1]))]
            found += fresh
        return found

    def stored(self, loaded: Loaded) -> Iterator[Stored]:
        tensors = load_file(self.directory / WEIGHTS)
        said = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))["quantization"]
        bits, group = said["bits"], said["group_size"]
        for theirs, ours in stored_names(loaded.decoder.state_dict(), family_of(loaded.config.model_type)).items():
            name = theirs.replace("transformer.", "model.").removesuffix("weight")
            if f"{name}scales" in tensors:
                codes = codes_in(tensors[f"{name}weight"].view(torch.uint8), bits).unflatten(1, (-1, group))
                scales, biases = (tensors[f"{name}{part}"].float()[..., None] for part in ("scales", "biases"))
                yield Stored(name, ours, (codes * scales + biases).flatten(1), f"int{bits}", group)


# -- Spaces -----------------------------------------------------------------------------------------------------------

GRADIO = "6.31.0"
SPACE_APP = Path(__file__).with_name("space_app.py")
REQUIREMENTS = ("torch>=2.10", "transformers>=5.3")


def write_space(model: Path, folder: Path) -> None:
    """A Space of Hugging Face: `app.py` with a page by Gradio, its requirements, README.md, and `model` in a folder.

    Raises `UserError` for a model that transformers does not read.
    """
    model_type = SLMConfig.from_pretrained(model).model_type
    if model_type in NOT_IN_TRANSFORMERS:
        raise UserError(f"{model}: transformers has no {model_type!r}, and a Space runs with it: export to html")
    shutil.copyfile(SPACE_APP, folder / "app.py")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    header = {
        "title": folder.name, "emoji": "🌱", "colorFrom": "green", "colorTo": "blue", "sdk": "gradio",
        "sdk_version": GRADIO, "app_file": "app.py", "pinned": False,
    }  # fmt: skip
    text = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "model").mkdir()
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name != "MANIFEST.json":
            shutil.copyfile(path, folder / "model" / path.name)
