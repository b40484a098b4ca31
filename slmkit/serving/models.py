"""The models that a server offers by name, and what of a request only it can decide: ids, and whether they fit.

Nothing here touches an engine: `Worker` steps those in its own thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from slmkit.config import UserError
from slmkit.generation.engine import Engine
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.tokenizer import SLMTokenizer


class PromptTooLongError(UserError):
    """A prompt that does not fit into the model's context."""


@dataclass
class ServedModel:
    """One name of `/v1/models`. `settings` is the model's advice, for fields that a request leaves out.

    `max_new_tokens` is what a chat request gets that does not say; `options` are those of `Engine`.
    """

    name: str
    decoder: LanguageModel
    tokenizer: SLMTokenizer
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    max_new_tokens: int = 2**31 - 1  # as many as fit into the context
    options: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        """An engine without requests, whose prefix cache is empty."""
        return Engine(self.decoder, self.tokenizer, **self.options)

    @classmethod
    def load(cls, name: str, directory: str | Path, device: str = "auto", **options: Any) -> ServedModel:
        """The model, adapter or run in `directory`. Raises `UserError` as `load_model` does."""
        from slmkit.adapt.load import load_model
        from slmkit.device import find_device
        from slmkit.find import find_model_directory
        from slmkit.model.files.generation_config import new_tokens, read_generation_config

        found = find_model_directory(str(directory))
        settings = SamplingSettings.for_model(found, None, {})  # OpenAI's: temperature 1, and nothing else
        tokenizer = SLMTokenizer.from_pretrained(found)
        decoder, config = load_model(found, find_device(device).torch_device)
        tokenizer.use_generation_config(config.for_generation())
        most = new_tokens(read_generation_config(found), usual=decoder.max_positions)
        return cls(name, decoder, tokenizer, settings, most, options)

    # -- prompts ------------------------------------------------------------------------------------------------------

    @cached_property
    def longest_token(self) -> int:
        """In bytes."""
        return self.tokenizer.longest_token

    def expect_room(self, tokens: int, least: int = 1, at_least: str = "") -> None:
        """Raises `PromptTooLongError` unless a prompt leaves room for `least` new tokens."""
        if tokens > self.decoder.max_positions - least:
            raise PromptTooLongError(
                f"the prompt has {at_least}{tokens:,} tokens and {self.name}'s context {self.decoder.max_positions:,}, "
                f"prompt and new tokens together: shorten it (nothing is cut off here)"
            )

    def expect_short(self, *texts: str) -> None:
        """Raises `PromptTooLongError` for texts that cannot fit, by the bytes that a token has at most."""
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        self.expect_room(-(-size // self.longest_token), 0, "at least ")

    def text_ids(self, prompt: str | Sequence[int], least: int = 1) -> Sequence[int]:
        """The ids [prompt] of a text, with the tokenizer's own beginning; ids as they are."""
        if isinstance(prompt, str):
            self.expect_short(prompt)
            prompt = self.tokenizer.encode_prompt(prompt)
        self.expect_room(len(prompt), least)
        return prompt

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continues: bool = False,
        switches: Mapping[str, bool] | None = None,
    ) -> list[int]:
        """The ids [prompt] of a conversation to be answered, or whose last message is to be continued."""
        self.expect_room(len(messages), 0, "at least ")
        self.expect_short(*(message["content"] for message in messages))
        ids = self.tokenizer.encode_chat_prompt(messages, add_generation_prompt, continues, tools, switches)
        self.expect_room(len(ids))
        return ids

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int], run: Callable[[Callable[[], Any]], Any]) -> torch.Tensor:
        """ids [tokens] → the mean of their final hidden states, float32 [width].

        `run` calls a function in the thread that may use the model: once per piece, so that others are not held up.
        """
        size = self.engine.pools.at_once
        cache, total = self.decoder.new_cache(1, len(ids), size), torch.zeros(())
        for first in range(0, len(ids), size):
            total = total + run(partial(self._sum, ids[first : first + size], cache))
        return total / len(ids)

    def _sum(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """ids [tokens] → the sum of their hidden states [width]."""
        with evaluating(self.decoder):
            return self.decoder(torch.tensor([ids], device=self.decoder.device), cache)[0].float().sum(0).cpu()
