"""What clients send and what errors look like: OpenAI's fields, and those of vLLM that clients send as `extra_body`.

`null` is absent. Fields that change nothing are accepted; what would change the answer and is not there is refused by
name, and so is a misspelling, with the nearest name. Every number, text and list has a bound.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import ConfigDict, Field, field_validator, model_validator

from slmkit.config import Settings, UserError, did_you_mean, load_settings, read_table
from slmkit.generation.sampling_settings import Bias, CountPenalty, SamplingSettings
from slmkit.generation.text import LONGEST_STOP, MOST_STOPS
from slmkit.model.files import generation_config as published

MOST_ROWS = 128  # texts of one request: prompts times `n`
MOST_EMBEDDED, EMBEDDED_TOKENS = 2048, 300_000  # texts of one request for embeddings, and their tokens: OpenAI's limits
LONGEST_MESSAGE = 600  # characters of an error, which may quote what was sent
JSON = dict[str, Any]
logger = logging.getLogger(__name__)

# Known fields that would change the answer, and what to do instead.
REFUSED: dict[str, str] = read_table(Path(__file__).with_name("refused_fields.yaml"))


class ApiError(Exception):
    """An answer that is an error. `param`: the field at fault; `code`: what programs compare."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def envelope(self) -> JSON:
        """OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = str(self) if len(str(self)) <= LONGEST_MESSAGE else f"{str(self)[:LONGEST_MESSAGE]}…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def try_later(status: int, message: str, seconds: float = 1.0) -> ApiError:
    """With `Retry-After`: 429 for too many requests, 503 from a server that takes none."""
    code = "rate_limit_exceeded" if status == 429 else "service_unavailable"
    return ApiError(status, message, code=code, headers={"Retry-After": str(math.ceil(seconds))})


def api_error(error: Exception) -> ApiError:
    """Any exception as an error of the API. One that is no answer to a client is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        name = str(error).partition(":")[0]  # most begin with the field
        return ApiError(400, str(error), name if name.isidentifier() else None)
    if isinstance(error, pydantic.ValidationError):  # of the arguments of the page's functions
        first = error.errors()[0]
        return ApiError(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request: its log says why", code="internal_error")


class Fields(Settings):
    """Base of all objects in a request: exact types, and finite numbers. Unknown fields may only be null."""

    model_config = ConfigDict(
        strict=True,
        allow_inf_nan=False,
        validate_assignment=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """Without nulls, which are absent; whole numbers as such, since some clients send 5.0."""
        if not isinstance(value, dict):
            return value
        whole = {name: int(one) for name, one in value.items() if isinstance(one, float) and one.is_integer()}
        return {name: one for name, one in (value | whole).items() if one is not None}


# -- the fields -------------------------------------------------------------------------------------------------------

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]
Top = Annotated[int, Field(ge=0, le=20)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
Several = Field(fail_fast=True, min_length=1, max_length=MOST_ROWS)
Texts = str | Ids | Annotated[list[str], Several] | Annotated[list[Ids], Several]
ManyOf = Field(fail_fast=True, min_length=1, max_length=MOST_EMBEDDED)
ManyTexts = str | Ids | Annotated[list[str], ManyOf] | Annotated[list[Ids], ManyOf]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # never added
    continuous_usage_stats: Literal[False] | None = None


class StructuredOutputs(Fields):
    """vLLM's: one of these."""

    json_: JSON | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None


class Common(Fields):
    """Of every route. Those below `model` change nothing here."""

    model: str
    user: str | None = None
    metadata: JSON | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None  # vLLM's: beginnings are kept apart by key already
    prompt_cache_retention: str | None = None


class Generation(Common):
    """How to continue a prompt, and the form of the answer."""

    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    max_tokens: Tokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # Of `SamplingSettings`.
    temperature: published.Temperature | None = None
    top_k: Annotated[int, Field(ge=-1, description="0 or -1: all tokens")] | None = None
    top_p: published.TopP | None = None
    min_p: published.MinP | None = None
    typical_p: published.TypicalP | None = None
    repetition_penalty: published.Penalty | None = None
    presence_penalty: CountPenalty | None = None
    frequency_penalty: CountPenalty | None = None
    logit_bias: (
        Annotated[dict[Token, Bias], Field(max_length=300, json_schema_extra={"additionalProperties": False})] | None
    ) = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    # Without effect, with the values that say so.
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: Literal[False] | None = None

    def sampling(self, advice: SamplingSettings) -> SamplingSettings:
        """The request's settings, and the model's for what it leaves out."""
        names = SamplingSettings.model_fields.keys() & type(self).model_fields.keys()
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        return load_settings(SamplingSettings, advice.model_dump() | given)


class CompletionRequest(Generation):
    """`/v1/completions`."""

    prompt: Texts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: only scores the prompt
    echo: bool | None = None
    logprobs: Top | None = None


class Part(Fields):
    """Of a message's content: text alone."""

    type: Literal["text"]
    text: str
    cache_control: JSON | None = None  # changes nothing


class Function(Fields):
    name: str
    arguments: str | JSON


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    function: Function


class ChatMessage(Fields):
    """`annotations` and `refusal` come back in messages that clients copy from answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and (kind := part.get("type", "text")) != "text":
                what = f"content of type {kind!r:.80} is not supported: the models read text alone"
                raise ApiError(400, what, "messages", "unsupported_parameter")
        return content

    def for_template(self) -> JSON:
        """As templates expect it: content as one text, arguments as an object."""
        message = self.model_dump(exclude_none=True, exclude={"annotations", "refusal"})
        parts = self.content if isinstance(self.content, list) else []
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = "".join(part.text for part in parts) if parts else self.content or ""
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = _object_in(call["function"]["arguments"])
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        return message


class ToolFunction(Fields):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JSON | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: ToolFunction


class JSONSchema(Fields):
    name: str | None = None
    description: str | None = None
    schema_: JSON = Field(alias="schema")
    strict: bool | None = None  # the schema is followed in any case


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class ChatRequest(Generation):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, bool], Field(max_length=16)] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: JSON | None = None  # would only make it faster


class EmbeddingRequest(Common):
    """`/v1/embeddings`."""

    input: ManyTexts
    encoding_format: Literal["float", "base64"] | None = None


class ErrorFields(Settings):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Settings):
    """OpenAI's error object, for the OpenAPI document."""

    error: ErrorFields


# -- reading ----------------------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Common)


def json_object(body: bytes) -> JSON:
    """The object in a body. Raises `ApiError`."""
    try:  # bounded in depth; NaN and lone surrogates are errors
        content = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body: expected a JSON object", code="invalid_json")
    return content


def read(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises `ApiError` with the field at fault."""
    content = {name: value for name, value in json_object(body).items() if value is not None}
    for name in content.keys() & REFUSED.keys():
        raise ApiError(400, f"{name} is not supported: {REFUSED[name]}", name, "unsupported_parameter")
    for name in content.keys() - set(kind.key_names()):
        near = did_you_mean(name, kind.key_names())
        raise ApiError(400, f"unknown field {name!r:.80}; {near}", name[:80], "unknown_parameter")
    try:
        return load_settings(kind, content)
    except UserError as error:
        name = re.split(r"\W", str(error).removeprefix("unknown key '"))[0]
        raise ApiError(400, str(error), name if name in content or "is missing" in str(error) else None) from None


def several(given: Any) -> list[Any]:
    """The texts, or lists of ids [tokens], of a field that may be one of them or a list."""
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _object_in(arguments: str | JSON) -> str | JSON:
    """Arguments of a call, which OpenAI writes as JSON in a text, as an object if they are one."""
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
