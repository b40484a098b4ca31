"""`SLMForCausalLM` and `SLMEnsemble`: models with the forward pass, output and `generate` of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slmkit.adapt.load import load_model
from slmkit.adapt.lora import adapted_linears
from slmkit.adapt.quantize import quantized_modules
from slmkit.adapt.quantized_files import save_quantized
from slmkit.config import UserError, load_settings, methods_checked
from slmkit.data.packing import IGNORED
from slmkit.device import DeviceError, checked_device
from slmkit.files.find import find_model_directory
from slmkit.generation.ensemble import Ensemble, common_tokenizer
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.files.directory import save_decoder
from slmkit.model.files.generation_config import new_tokens
from slmkit.model.initialization import build_decoder, grow_vocabulary
from slmkit.tokenizer import SLMTokenizer

_LOGGER = logging.getLogger(__name__)


class CausalLMOutput(dict[str, Tensor]):
    """`loss` [] (if labels were given) and `logits` [batch, sequence, vocab_size]: read as attributes, by name, by
    index or as a tuple, as in transformers; `loss, logits = output` unpacks the tensors.
    """

    def __getattr__(self, name: str) -> Tensor | None:
        if name in self:
            return self[name]
        if name == "loss":
            return None
        raise AttributeError(f"the output has {', '.join(self.keys())}, and no {name!r}")

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values())

    def to_tuple(self) -> tuple[Tensor, ...]:  # shapes as above
        return tuple(self.values())


@methods_checked
class GeneratingModel(nn.Module):
    """Base class: forward pass to logits, and generation."""

    # With these, transformers.Trainer passes the number of learned labels as `num_items_in_batch` to `forward`.
    accepts_loss_kwargs, loss_type = True, "ForCausalLM"

    def __init__(self, config: SLMConfig, decoder: Decoder | Ensemble) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutput:
        """input_ids, attention_mask and labels [batch, sequence] → `.logits` [batch, sequence, vocab_size], float32.

        `attention_mask` is 0 for padding, on either side, and 1 elsewhere. With `labels`, which are `input_ids` with
        -100 for positions to ignore (they are shifted here), `.loss` is the mean cross-entropy in nats; with
        `num_items_in_batch` the sum divided by that number. Raises `UserError` for more tokens than the context, for
        inputs of another type or shape, and on the CPU for ids outside the vocabulary.
        """
        self._expect(input_ids, attention_mask)
        if labels is not None:
            _expect_ids("labels", labels, self.config.vocab_size, input_ids.shape)
        if attention_mask is not None:
            # Right padding comes after every real token, so that the causal mask suffices.
            attention_mask = attention_mask.bool()
            if not attention_mask.is_meta and not bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
                attention_mask = None
        hidden = self.decoder(input_ids, attention_mask=attention_mask)
        logits = self.decoder.logits(hidden).float()
        if labels is None:
            return CausalLMOutput(logits=logits)
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(logits.device).long()
        if num_items_in_batch is None:
            return CausalLMOutput(loss=F.cross_entropy(logits.flatten(0, 1), shifted), logits=logits)
        total = F.cross_entropy(logits.flatten(0, 1), shifted, reduction="sum")
        return CausalLMOutput(loss=total / torch.as_tensor(num_items_in_batch, device=total.device), logits=logits)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool | None = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
    ) -> Tensor:
        """input_ids [batch, prompt] → [batch * num_return_sequences, prompt + new], with the prompt; arguments as in
        transformers.

        `attention_mask` [batch, prompt] is 0 for padding, at the left of shorter prompts, and 1 elsewhere.
        `max_length` counts the prompt, `max_new_tokens` does not; the default is that of the model's
        `generation_config.json`, or its whole context.
        Finished rows are filled with `pad_token_id`. Raises `UserError` for invalid arguments.
        """
        sampling = {
            "do_sample": False if do_sample is None else do_sample, "temperature": temperature, "top_k": top_k,
            "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed,
        }  # fmt: skip
        settings = load_settings(SamplingSettings, sampling)
        _expect_weights(self.decoder)
        self._expect(input_ids, attention_mask)
        for name, count in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
            if count is not None and not isinstance(count, int):
                raise UserError(f"{name} {count!r}: expected a whole number")
        prompt = input_ids.size(1)
        if max_new_tokens is None:
            room = (max_length or self.decoder.max_positions) - prompt
            max_new_tokens = room if max_length else new_tokens(self.config.generation_config, room, prompt)
            if max_length and room < 1:
                raise UserError(f"max_length {max_length} is not above the {prompt} tokens of the prompt: raise it")
        for name, given in (("eos_token_id", eos_token_id), ("pad_token_id", pad_token_id)):
            _expect_known(name, given, self.config.vocab_size)
        ids = generate_ids(
            self.decoder,
            input_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=_as_set(self.config.for_generation()["eos_token_id"] if eos_token_id is None else eos_token_id),
            settings=settings,
            pad_token_id=_first(pad_token_id, self.config.pad_token_id, 0),
            padding=_left_padding(attention_mask),
            num_return_sequences=num_return_sequences,
            known=self.known_ids,
        )
        if ids.size(1) == self.decoder.max_positions < prompt + max_new_tokens:
            _LOGGER.warning(
                f"the model's context of {ids.size(1)} tokens ends the text after {ids.size(1) - prompt} new ones, "
                f"not {max_new_tokens}"
            )
        return ids

    def _expect(self, input_ids: Any, attention_mask: Tensor | None) -> None:
        """Raise `UserError` unless both are [batch, sequence], on the model's device, and the ids in its vocabulary."""
        _expect_ids("input_ids", input_ids, self.config.vocab_size)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise UserError(
                f"attention_mask: expected 0 and 1 in the shape of input_ids, {[*input_ids.shape]}, "
                f"found {[*attention_mask.shape]}"
            )
        for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
            if given is not None and given.device != self.device:
                raise UserError(f"{name}: on {given.device}, the model is on {self.device}: {name}.to(model.device)")

    @cached_property
    def known_ids(self) -> np.ndarray | None:
        """The ids of the tokenizer in the model's directory, bool [ids]; no others are generated. None without one."""
        directory = getattr(self, "directory", None)
        if directory is None or not (directory / "tokenizer.json").is_file():
            return None
        tokenizer = SLMTokenizer.from_pretrained(directory)
        tokenizer.use_generation_config(self.config.for_generation())
        return tokenizer.known_ids


@methods_checked
class SLMForCausalLM(GeneratingModel):
    """A causal language model, with the methods that `transformers.Trainer` and `accelerate` call."""

    decoder: Decoder

    def __init__(self, config: SLMConfig, decoder: Decoder | None = None) -> None:
        """New weights, drawn from torch's global generator (`torch.manual_seed`), unless a decoder is given."""
        super().__init__(config, decoder or build_decoder(config, seed=int(torch.randint(2**62, (), device="cpu"))))
        self.directory: Path | None = None  # where it was read from

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu") -> SLMForCausalLM:
        """Read a model directory, an adapter (folded into its base), a run's best checkpoint, or a hub model
        (`OWNER/NAME@REVISION`), in evaluation mode.

        Raises `UserError` for a missing or damaged model.
        """
        found = find_model_directory(directory).resolve()
        try:
            decoder, config = load_model(found, checked_device(str(device)))
        except DeviceError as error:
            raise UserError(str(error)) from None
        model = cls(config, decoder)
        model.directory = found
        return model.eval()

    def save_pretrained(
        self,
        directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        save_function: Any = None,
    ) -> None:
        """Write a Hugging Face model directory. Raises `UserError` if that fails, or the model has an adapter.

        The other arguments are for `accelerate`: only the main process writes, `state_dict` replaces the model's own if
        that is sharded, and `save_function` is ignored, since weights are always safetensors.
        """
        if not is_main_process:
            return
        if state_dict is None:
            _expect_weights(self.decoder)
        if adapted_linears(self.decoder):
            raise UserError("the model has an adapter: fold(model.decoder) that first, with slmkit.adapt.lora.fold")
        weights = None if state_dict is None else {k.removeprefix("decoder."): v for k, v in state_dict.items()}
        if quantized_modules(self.decoder):
            save_quantized(self.decoder, self.config, directory)
        else:
            save_decoder(self.decoder, self.config, directory, weights)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head; with tied embeddings, the embedding."""
        return self.decoder.embedding if self.decoder.head is None else self.decoder.head

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Module:
        """Add rows for new tokens, each the mean of all; make optimizers afterwards. Raises `UserError` for fewer."""
        old = self.config.vocab_size
        if new_num_tokens < old:
            raise UserError(
                f"resize_token_embeddings({new_num_tokens}): the model has {old} tokens, and none is removed"
            )
        pieces = {token: range(old) for token in range(old, new_num_tokens)}
        self.decoder, self.config = grow_vocabulary(self.decoder, self.config, pieces)
        self.__dict__["known_ids"] = None  # the tokenizer in the model's directory lacks the new ids
        return self.get_input_embeddings()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Recompute every n-th layer in the backward pass instead of keeping its activations.

        The keyword arguments for `torch.utils.checkpoint` are ignored. Raises `UserError` for `offload`.
        """
        if offload:
            raise UserError("gradient checkpointing has no offload here: leave offload out")
        self.decoder.recompute_every = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.recompute_every = 0

    activation_checkpointing_enable = gradient_checkpointing_enable  # transformers 5's name
    activation_checkpointing_disable = gradient_checkpointing_disable

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        left_out = {self.decoder.embedding.weight} if exclude_embeddings else set()
        counted = [p for p in self.parameters() if p.requires_grad or not only_trainable]
        quantized = {} if only_trainable else quantized_modules(self.decoder)
        if exclude_embeddings:
            quantized.pop("embedding", None)
        return sum(p.numel() for p in counted if p not in left_out) + sum(m.numel for m in quantized.values())


def _expect_ids(name: str, ids: Any, vocab_size: int, shape: torch.Size | None = None) -> None:
    """Raises `UserError` unless `ids` are ids [batch, sequence], of `shape` if given; labels may be -100."""
    if not isinstance(ids, Tensor):
        raise UserError(f"{name}: expected a tensor of ids [batch, sequence], found {type(ids).__name__}")
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(
            f"{name}: expected whole numbers [batch, sequence], at least one, found {ids.dtype} {[*ids.shape]}"
        )
    if shape is not None and ids.shape != shape:
        raise UserError(f"{name}: expected the shape of input_ids, {[*shape]}, found {[*ids.shape]}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():  # reading values would synchronise with the device
        return
    low, high = (ids if shape is None else ids.masked_fill(ids == IGNORED, 0)).aminmax()
    if low < 0 or high >= vocab_size:
        raise UserError(f"{name}: found {int(low if low < 0 else high)}, expected ids from 0 to {vocab_size - 1}")


def _expect_weights(decoder: Decoder | Ensemble) -> None:
    if decoder.device.type == "meta":
        raise UserError("the model has no weights yet, it is on the meta device: to_empty(), then load_state_dict()")


def _left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """[batch, prompt] of 0 and 1 → [batch], zeros at the left. Raises `UserError` for other zeros or an empty row."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask[:, -1].all()):
        raise UserError("attention_mask: prompts of different lengths are padded at their left (0 … 0 1 … 1)")
    return (attention_mask == 0).sum(1)


def _as_set(ids: int | Sequence[int] | None) -> set[int]:
    if ids is None:
        return set()
    return {*ids} if isinstance(ids, Sequence) else {ids}


def _expect_known(name: str, ids: Any, vocab_size: int) -> None:
    """Raise `UserError` unless `ids` is None, an id of the vocabulary, or several."""
    listed = [] if ids is None else [*ids] if name == "eos_token_id" and isinstance(ids, Sequence) else [ids]
    if not all(isinstance(one, int | np.integer) and 0 <= one < vocab_size for one in listed):
        expected = "an id or a list of ids" if name == "eos_token_id" else "an id"
        raise UserError(f"{name} {ids!r}: expected {expected} from 0 to {vocab_size - 1}")


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


@methods_checked
class SLMEnsemble(GeneratingModel):
    """Models with one tokenizer, whose probabilities are averaged; `forward` and `generate` as in `SLMForCausalLM`.

    End tokens, padding, and the ids that may be generated are those of the first model.
    """

    decoder: Ensemble

    def __init__(self, models: Sequence[SLMForCausalLM], weights: Sequence[float] | None = None) -> None:
        """Raises `UserError` as `Ensemble` does. Does not check that the models share a tokenizer."""
        decoder = Ensemble([model.decoder for model in models], weights)
        super().__init__(models[0].config, decoder)
        self.__dict__["known_ids"] = models[0].known_ids

    @classmethod
    def from_pretrained(
        cls, directories: Sequence[str | Path], weights: Sequence[float] | None = None, device: str = "cpu"
    ) -> SLMEnsemble:
        """Read model directories, runs or hub models, each with its tokenizer.

        Raises `UserError` for a missing or damaged model, and if their tokenizers differ.
        """
        found = [find_model_directory(directory) for directory in directories]
        common_tokenizer(found)
        return cls([SLMForCausalLM.from_pretrained(directory, device) for directory in found], weights).eval()
