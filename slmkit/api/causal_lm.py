"""`SLMForCausalLM`: a model as a script knows it, put together from decoder, directory and generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slmkit.adapt.load import load_model
from slmkit.adapt.lora import adapted_linears
from slmkit.config import UserError
from slmkit.generation import Ensemble, SamplingSettings, generate_ids
from slmkit.model import Decoder, SLMConfig, build_decoder, save_decoder
from slmkit.training.find import find_model_directory


class GeneratingModel(nn.Module):
    """A model with its head, and the config that says how its texts end: token ids in, logits or more ids out."""

    def __init__(self, config: SLMConfig, decoder: Decoder | Ensemble) -> None:
        super().__init__()
        self.config, self.decoder = config, decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [batch, sequence] → logits [batch, sequence, vocab_size], float32."""
        return self.decoder.logits(self.decoder(input_ids)).float()

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
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
        """input_ids [batch, prompt] → [batch * num_return_sequences, prompt + new], the prompt included; meanings as in
        transformers.

        `attention_mask` [batch, prompt] is 0 where a shorter prompt is padded, at its left, and 1 elsewhere.
        `max_length` counts the prompt, `max_new_tokens` does not; with neither it is the model's whole context.
        Rows that have ended are filled with `pad_token_id`.
        """
        settings = SamplingSettings(
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        prompt = input_ids.size(1)
        if max_new_tokens is None:
            max_new_tokens = (max_length or self.decoder.max_positions) - prompt
        if max_new_tokens < 1:
            raise UserError(f"max_length {max_length} leaves no room after a prompt of {prompt} tokens: raise it")
        return generate_ids(
            self.decoder,
            input_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=_as_set(self.config.eos_token_id if eos_token_id is None else eos_token_id),
            settings=settings,
            pad_token_id=_first(pad_token_id, self.config.pad_token_id, 0),
            padding=_left_padding(attention_mask),
            num_return_sequences=num_return_sequences,
        )


class SLMForCausalLM(GeneratingModel):
    """A decoder with its head: token ids in, logits out."""

    decoder: Decoder

    def __init__(self, config: SLMConfig, decoder: Decoder | None = None) -> None:
        """Fresh weights, drawn from torch's global generator (`torch.manual_seed`), unless a decoder is given."""
        super().__init__(config, decoder or build_decoder(config, seed=int(torch.randint(2**62, ()))))
        self.directory: Path | None = None  # where it was read from

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: str = "cpu") -> SLMForCausalLM:
        """Read a model directory, an adapter folded into its base, or a run's best checkpoint, in evaluation mode.

        Raises `UserError`.
        """
        found = find_model_directory(directory).resolve()
        decoder, config = load_model(found, device)
        model = cls(config, decoder)
        model.directory = found
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Hugging Face model directory. Raises `UserError` when it cannot be written, or has an adapter."""
        if adapted_linears(self.decoder):
            raise UserError("the model has an adapter: fold(model.decoder) that first, with slmkit.adapt.fold")
        save_decoder(self.decoder, self.config, directory)


def _left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """[batch, prompt] of 0 and 1 → [batch] zeros at the left. Raises `UserError` for a hole or an empty row."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask.diff(dim=1) < 0).any()) or not bool(attention_mask[:, -1].all()):
        raise UserError("attention_mask: prompts of different lengths are padded at their left (0 … 0 1 … 1)")
    return (attention_mask == 0).sum(1)


def _as_set(ids: int | Sequence[int] | None) -> set[int]:
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else set(ids)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
