"""The models that a server offers by name, and the engine's request for each that a client sends.

Nothing here touches an engine: `Worker` steps those in its own thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slmkit.config import UserError
from slmkit.generation.constraints import Grammar
from slmkit.generation.engine import Engine, Request
from slmkit.generation.ensemble import LanguageModel, evaluating
from slmkit.generation.sampling_settings import USUAL, USUAL_IN_CHAT, SamplingSettings
from slmkit.generation.text import end_tokens
from slmkit.serving.protocol import JSON, MOST_ROWS, ApiError, ChatRequest, CompletionRequest, Generation, Tool, several
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat_prompt import CallFormat

ANY_OBJECT = {"type": "object"}  # as a schema
COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass
class ServedModel:
    """One name of `/v1/models`. For fields that a request leaves out: `settings` of a chat, `text_settings` of a text.

    `max_new_tokens` is what a chat request gets that does not say; `options` are those of `Engine`.
    """

    name: str
    decoder: LanguageModel
    tokenizer: SLMTokenizer
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    text_settings: SamplingSettings = field(default_factory=SamplingSettings)
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
        from slmkit.files.find import find_model_directory
        from slmkit.model.files.generation_config import new_tokens, read_generation_config

        found = find_model_directory(str(directory))
        chat, text = (SamplingSettings.for_model(found, None, usual) for usual in (USUAL_IN_CHAT, USUAL))
        tokenizer = SLMTokenizer.from_pretrained(found)
        decoder, config = load_model(found, find_device(device).torch_device)
        tokenizer.use_generation_config(config.for_generation())
        most = new_tokens(read_generation_config(found), usual=decoder.max_positions)
        return cls(name, decoder, tokenizer, chat, text, most, options)

    # -- prompts ------------------------------------------------------------------------------------------------------

    @cached_property
    def longest_token(self) -> int:
        """In bytes."""
        return self.tokenizer.longest_token

    @cached_property
    def unseen(self) -> frozenset[int]:
        """Tokens that are not in the text of an answer."""
        return frozenset(end_tokens(self.tokenizer)) | {*self.tokenizer.special_tokens.values()}

    def expect_room(self, tokens: int, least: int = 1, at_least: str = "") -> None:
        """Raises `ApiError` unless a prompt leaves room for `least` new tokens."""
        if tokens > self.decoder.max_positions - least:
            message = (
                f"the prompt has {at_least}{tokens} tokens, and prompt and answer together have room for "
                f"{self.decoder.max_positions}: shorten it (nothing is cut off here)"
            )
            raise ApiError(400, message, code="context_length_exceeded")

    def expect_short(self, *texts: str) -> None:
        """Raises `ApiError` for texts that cannot fit, by the bytes that a token has at most."""
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        self.expect_room(-(-size // self.longest_token), 0, "at least ")

    def text_ids(self, prompt: str | Sequence[int], least: int = 1) -> Sequence[int]:
        """The ids [prompt] of a text, with the tokenizer's own beginning; ids as they are."""
        if isinstance(prompt, str):
            self.expect_short(prompt)
            prompt = self.tokenizer.encode_prompt(prompt)
        self.expect_room(len(prompt), least)
        if max(prompt) >= self.decoder.vocab_size:
            raise UserError(
                f"token {max(prompt)} of the prompt: the model has {self.decoder.vocab_size:,} tokens, from 0"
            )
        return prompt

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def embeddings(self, texts: Sequence[Sequence[int]]) -> Iterator[list[torch.Tensor]]:
        """Texts of ids [tokens] → the mean of their final hidden states, float32 [width], of some texts at a time.

        Each iteration reads about as many tokens as a step of the engine, so that both can take turns.
        """
        size, found = self.engine.pools.at_once, list[torch.Tensor]()
        left = size
        for ids in texts:
            cache, total = self.decoder.new_cache(1, len(ids), size), torch.zeros(())
            for first in range(0, len(ids), size):
                if left <= 0:
                    yield found
                    found, left = [], size
                piece = ids[first : first + size]
                total, left = total + self._sum(piece, cache), left - len(piece)
            found.append(total / len(ids))
        yield found

    def _sum(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """ids [tokens] → the sum of their hidden states [width]."""
        with evaluating(self.decoder):
            return self.decoder(torch.tensor([ids], device=self.decoder.device), cache)[0].float().sum(0).cpu()


# -- from a request to the engine's -----------------------------------------------------------------------------------


def chat_requests(body: ChatRequest, model: ServedModel, group: str) -> list[Request]:
    """The engine's request. Renders and encodes, so not for the event loop. Raises `UserError` and `ApiError`."""
    forced = body.tool_choice not in (None, "auto", "none")
    prompt = _chat_ids(body, model)
    grammar = _grammar(body, model)
    if forced:
        if grammar is not None:
            raise ApiError(400, "tool_choice: an answer is a call or has a response_format, not both", "tool_choice")
        written = _call_format(model, "tool_choice")
        prompt = [*prompt, *model.tokenizer.encode_continuation(written.before)]
        grammar = _grammar_of_calls(body, written, model.tokenizer)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    most = model.max_new_tokens if most is None else most
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    return [_request(body, model, prompt, most, group, grammar, logprobs)]


def _chat_ids(body: ChatRequest, model: ServedModel) -> list[int]:
    """The ids [prompt] of the conversation, to be answered or continued. Raises `ApiError`."""
    messages = [message.for_template() for message in body.messages]
    continues = bool(body.continue_final_message)
    begins = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    if continues and begins:
        raise ApiError(400, "continue_final_message and add_generation_prompt: one of them", "continue_final_message")
    if continues and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
        raise ApiError(400, "continue_final_message: the last message is no text of the assistant", "messages")
    tools = [tool.model_dump(exclude_none=True) for tool in _tools(body)]
    model.expect_room(len(messages), 0, "at least ")
    model.expect_short(*(message["content"] for message in messages))
    switches = body.chat_template_kwargs
    ids = model.tokenizer.encode_chat_prompt(messages, tools, begins=begins, continues=continues, switches=switches)
    model.expect_room(len(ids))
    return ids


def completion_requests(body: CompletionRequest, model: ServedModel, group: str) -> list[Request]:
    """The engine's request of each prompt. Encodes, so not for the event loop. Raises `UserError` and `ApiError`."""
    n, grammar, logprobs, given = body.n or 1, _grammar(body, model), body.logprobs, several(body.prompt)
    if len(given) * n > MOST_ROWS:
        raise ApiError(400, f"{len(given)} prompts of n {n}: at most {MOST_ROWS} texts of one request", "prompt")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and logprobs is not None and body.stream and n > 1:
        raise ApiError(400, "echo with logprobs of several choices is not streamed: send stream: false", "stream")
    # Without new tokens the engine only scores the prompt.
    scores = logprobs if body.echo and logprobs is not None else 0 if most == 0 else None
    prompts = [model.text_ids(prompt, least=0 if most == 0 else 1) for prompt in given]
    return [_request(body, model, prompt, most, group, grammar, logprobs, scores) for prompt in prompts]


def _request(
    body: Generation,
    model: ServedModel,
    prompt: Sequence[int],
    most: int,
    group: str,
    grammar: Grammar | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> Request:
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of {body.best_of}: expected n, {body.n or 1}: nothing is ranked here", "best_of")
    stops = (set() if body.ignore_eos else end_tokens(model.tokenizer)) | {*(body.stop_token_ids or ())}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    advice = model.settings if isinstance(body, ChatRequest) else model.text_settings
    return Request(
        prompt, most, body.sampling(advice), stops, stop, body.n or 1, grammar, logprobs, prompt_logprobs,
        prefix_group=group,
    )  # fmt: skip


def rule_of(body: Generation) -> str:
    """The field that says what the text must be, if one does."""
    if getattr(body, "tool_choice", None) not in (None, "auto", "none"):
        return "tools"
    return "response_format" if body.structured_outputs is None else "structured_outputs"


def _grammar(body: Generation, model: ServedModel) -> Grammar | None:
    """What the text must be. Raises `ApiError` for several rules, and for what cannot be enforced."""
    given, wanted = body.structured_outputs, getattr(body, "response_format", None)
    rules: list[tuple[Callable[..., Grammar], Any]] = []
    if given is not None:
        rules = [(Grammar.json_schema, given.json_), (Grammar.regex, given.regex), (Grammar.choices, given.choice)]
    param = "structured_outputs" if given is not None else "response_format"
    if wanted is not None and wanted.type == "json_object":
        rules.append((Grammar.json_schema, ANY_OBJECT))
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise ApiError(400, "response_format: json_schema is missing", "response_format")
        rules.append((Grammar.json_schema, wanted.json_schema.schema_))
    rules = [(make, value) for make, value in rules if value is not None]
    if len(rules) > 1:
        raise ApiError(400, f"{param}: the text can follow one rule, found {len(rules)}", param)
    with at_fault(param):
        return rules[0][0](model.tokenizer, rules[0][1]) if rules else None


@contextlib.contextmanager
def at_fault(param: str) -> Iterator[None]:
    """A `UserError` within becomes an `ApiError` that names the place in the request."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param) from None


def _tools(body: ChatRequest) -> list[Any]:
    """The tools that are rendered into the prompt. Raises `ApiError` for a `tool_choice` that does not fit them."""
    choice, tools = body.tool_choice, body.tools or []
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice: needs tools", "tool_choice")
    if isinstance(choice, Tool) and choice.function.name not in [tool.function.name for tool in tools]:
        raise ApiError(400, f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")
    return [] if choice == "none" else tools


def _call_format(model: ServedModel, param: str) -> CallFormat:
    written = model.tokenizer.call_format
    if written is None or any(token in written.before for token in model.tokenizer.special_tokens):
        raise ApiError(400, f"{param}: this model's template writes calls in a way that cannot be enforced", param)
    return written


def _grammar_of_calls(body: ChatRequest, written: CallFormat, tokenizer: SLMTokenizer) -> Grammar:
    """A call of one of the tools, or of the one that is named. Raises `ApiError` that names the tool at fault."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, Tool) else None
    schemas = list[JSON]()
    for number, tool in enumerate(body.tools or []):
        if named in (None, tool.function.name):
            schemas.append(_schema_of_call(tool, written, f"tool:{number}"))
            with at_fault(f"tools[{number}].function.parameters"):  # alone first, for an error that names it
                Grammar.json_schema(tokenizer, schemas[-1])
    with at_fault("tools"):
        return Grammar.json_schema(tokenizer, {"anyOf": schemas})


def _schema_of_call(tool: Tool, written: CallFormat, name: str) -> JSON:
    """`name` is the parameters' `$id`: a `#` in them is their own root then."""
    parameters = {"$id": name, **(tool.function.parameters or ANY_OBJECT)}
    parts = {written.name: {"const": tool.function.name}, written.arguments: parameters}
    return {"type": "object", "properties": parts, "required": [*parts], "additionalProperties": False}
