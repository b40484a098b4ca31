"""A model that is exported, and programs that run it: slmkit itself and `transformers`. The others are beside their
formats.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from slmkit.adapt.load import load_model
from slmkit.adapt.quantize import dequantize_modules, quantized_modules
from slmkit.config import UserError, one_line
from slmkit.files.find import find_model_directory
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.adapter_directory import base_of, is_adapter
from slmkit.model.files.directory import copy_extras, save_decoder
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import compiled

Message = dict[str, str]


@dataclass(frozen=True)
class Stored:
    """A matrix of a file, dequantized. `type` names its precision; each `group` neighbours of a row have one scale."""

    name: str
    parameters: Sequence[str]  # of the decoder, whose rows it has, one after another
    values: Tensor  # [out, in], or of the shape of `places`
    type: str
    group: int
    places: Tensor | None = None  # of each value in the rows of `parameters`, where they are moved


class Runtime(Protocol):
    """A program that runs a model: how it reads text, and what it predicts. Use it as a context manager."""

    name: str  # as in the table of `slm verify`
    size: int  # of the files of weights, in bytes
    rounds_activations: bool = False  # to 8 bits, for products with weights of 8 bits or fewer
    composes: bool = True  # whether it brings text into normal form C where the tokenizer does

    def encode(self, text: str) -> list[int]:
        """Ids [tokens] of a text, without beginning or end; special tokens spelled in it are ordinary text."""

    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities, over the whole vocabulary, of the token after ids[:length].

        → float32 [lengths, vocab_size]
        """

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids` [tokens], one after another. End tokens do not stop it."""

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        """Ids [tokens] of the rendered prompt, with the generation prompt; None without a chat template."""
        return None

    def stored(self, loaded: Loaded) -> Iterable[Stored]:
        """The matrices of the model's file, read by the rules of its format; none if nobody can."""
        return ()

    def close(self) -> None:
        """Ends processes and frees memory."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


class Slmkit(Runtime):
    """slmkit's own decoder, quantized or not. `size`: of its files of weights, in bytes."""

    def __init__(self, decoder: Decoder, tokenizer: SLMTokenizer, size: int, name: str = "slmkit") -> None:
        self.decoder, self.tokenizer, self.size, self.name = decoder, tokenizer, size, name

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        return self.tokenizer.encode_chat_prompt(messages) if self.tokenizer.chat_template else None

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        def read(part: Sequence[int], places: list[int]) -> torch.Tensor:
            hidden = self.decoder(torch.tensor([part]))[0, places]
            return self.decoder.logits(hidden)  # [places, vocab_size]

        return _at(read, ids, lengths, any(rope.depends_on_length for rope in self.decoder.ropes))

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        cache, fresh, found = self.decoder.new_cache(1, len(ids) + count, len(ids)), list(ids), list[int]()
        for _ in range(count):
            hidden = self.decoder(torch.tensor([fresh]), cache)[0, -1]
            fresh = [int(self.decoder.logits(hidden).argmax())]
            found += fresh
        return found


class Transformers(Runtime):
    """`transformers`, with weights in the precision of the files unless `dtype` names another.

    Raises `UserError` if it is not installed, cannot read the directory, or misses or does not know a tensor.
    """

    name = "transformers"
    _model: Any

    def __init__(self, directory: Path, dtype: str = "auto") -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("transformers is not installed: pip install transformers")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.directory, self.size = directory, sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                loading: Any = transformers.AutoModelForCausalLM.from_pretrained
                self._model, said = loading(directory, dtype=dtype, local_files_only=True, output_loading_info=True)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # those of safetensors and tokenizers have no other base
            raise UserError(f"transformers cannot read {directory}: {one_line(error)[:300]}") from None
        wrong = {kind: sorted(map(str, said[kind])) for kind in said if kind.endswith("_keys") and said[kind]}
        if wrong:
            raise UserError(f"transformers finds wrong tensors in {directory}: {str(wrong)[:300]}")
        self._model.eval()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_chat(self, messages: list[Message]) -> list[int] | None:
        if self._tokenizer.chat_template is None:
            return None
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        def read(part: Sequence[int], places: list[int]) -> torch.Tensor:
            return self._model(torch.tensor([part]), logits_to_keep=torch.tensor(places)).logits[0]

        return _at(read, ids, lengths, '"dynamic"' in self._model.config.to_json_string())  # its kind of RoPE

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        fresh, cache, found = list(ids), None, list[int]()
        for _ in range(count):
            out = self._model(torch.tensor([fresh]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            fresh, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            found += fresh
        return found

    def stored(self, loaded: Loaded) -> Iterator[Stored]:
        decoder, _ = load_model(self.directory)
        kinds = {f"{name}.weight": (one.kind, one.group) for name, one in quantized_modules(decoder).items()}
        dequantize_modules(decoder)
        for name, values in decoder.state_dict().items():
            if values.dim() == 2:
                kind, group = kinds.get(name, ("bfloat16", values.size(1)))
                yield Stored(name, [name], values, "int4" if kind == "nf4" else str(kind), group)


def codes_in(packed: Tensor, bits: int) -> Tensor:
    """Bytes of 8 / bits codes each, the first in the lowest bits [..., n] → float32 [..., n * 8 / bits]."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[..., None] >> places & 2**bits - 1).flatten(-2).float()


def _at(read: Any, ids: Sequence[int], lengths: Sequence[int], each_apart: bool) -> np.ndarray:
    """Log-probabilities [lengths, vocab_size] by `read`, (ids, places) → logits [places, vocab_size]: in one pass, or
    with `each_apart` one for each length.
    """
    passes = [[length] for length in lengths] if each_apart else [list(lengths)]
    logits = torch.cat([read(ids[: max(each)], [length - 1 for length in each]) for each in passes])
    return logits.float().log_softmax(-1).numpy()


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A model in float32, with the tokenizer that knows its end tokens. `source` is a directory with its weights as
    numbers of 16 or 32 bits.
    """

    name: str
    decoder: Decoder
    config: SLMConfig
    tokenizer: SLMTokenizer
    source: Path

    @property
    def runtime(self) -> Slmkit:
        size = sum(path.stat().st_size for path in self.source.glob("*.safetensors"))
        return Slmkit(self.decoder, self.tokenizer, size)


def load(model: str | Path, scratch: Path) -> Loaded:
    """A model in float32: an adapter merged, quantized weights dequantized, and the result written to `scratch`.

    Raises `UserError` as `load_model` does, for ids of the tokenizer without a row, and for an invalid chat template.
    """
    directory = find_model_directory(model)
    decoder, config = load_model(directory)
    of_base = is_adapter(directory) and not (directory / "tokenizer.json").is_file()
    with_tokenizer = base_of(directory) if of_base else directory
    tokenizer, source = SLMTokenizer.from_pretrained(with_tokenizer), directory
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{directory}: no rows for the tokenizer's ids {config.vocab_size:,} to {len(tokenizer) - 1:,}")
    if tokenizer.chat_template:
        compiled(tokenizer.chat_template)  # some targets do without a template that they cannot hold
    tokenizer.use_generation_config(config.for_generation())
    if is_adapter(directory) or quantized_modules(decoder):
        dequantize_modules(decoder)
        source = scratch
        save_decoder(decoder, config, source)
        copy_extras(with_tokenizer, source)
    return Loaded(str(model), decoder, config, tokenizer, source)
