"""Chat sessions: message history in, streamed answer out."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from slmkit.config import UserError
from slmkit.files import write_whole
from slmkit.generation.engine import FinishReason
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.generator import TextStream
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import check_messages

Messages = list[dict[str, str]]


class ChatSession:
    """Keeps the messages of a conversation and streams the model's answers.

    When history and answer exceed the context, the oldest exchanges are dropped (`forgotten` counts
    their messages); the system message is kept.
    """

    def __init__(
        self,
        decoder: LanguageModel,
        tokenizer: SLMTokenizer,
        settings: SamplingSettings,
        system: str | None = None,
        max_new_tokens: int = 300,
    ) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self.max_new_tokens = max_new_tokens
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self.forgotten = 0
        self.finish_reason: FinishReason | None = None  # of the last answer; None if it was interrupted

    def reset(self) -> None:
        """Delete all messages but the system message."""
        self.messages, self.forgotten = _beginning(self.messages), 0

    def reply(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to `text`. What was generated until the stream ends or is closed is added to the messages.

        Raises `UserError` if the message leaves no room for an answer; the messages then stay unchanged.
        """
        messages, prompt = self._that_fit([*self.messages, {"role": "user", "content": text}])
        stream = TextStream(
            self.decoder, self.tokenizer, prompt, settings=self.settings, max_new_tokens=self.max_new_tokens
        )
        self.forgotten += len(self.messages) + 1 - len(messages)
        self.messages, self.finish_reason = messages, None
        said: list[str] = []
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:
            self.finish_reason = stream.finish_reason
            answer = "".join(said).strip()
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()  # no answer: the template has no empty turns

    def _that_fit(self, messages: Messages) -> tuple[Messages, list[int]]:
        """The messages without the oldest exchanges, as few as leave room for an answer, and their ids [prompt]."""
        context = self.decoder.max_positions
        # At most a quarter of the context: reserving all of a large `max_new_tokens` would leave none for the history.
        room = max(1, min(self.max_new_tokens, context // 4))
        beginning = _beginning(messages)
        ids: list[int] = []
        for oldest in range(len(beginning), len(messages), 2):
            kept = beginning + messages[oldest:]
            ids = self.tokenizer.encode_chat(kept, add_generation_prompt=True).ids
            if len(ids) + room <= context:
                return kept, ids
        what = "a shorter message or system message" if beginning else "a shorter message"
        raise UserError(f"{len(ids)} tokens leave no room for an answer in a context of {context}: write {what}")

    def save(self, path: str | Path) -> None:
        """Write the conversation as one line of JSON (`{"messages": […]}`), the format of fine-tuning data.

        Raises `UserError` if it cannot be written; an existing file then stays unchanged.
        """
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            write_whole(Path(path), line.encode("utf-8", "replace").decode())  # terminals may pass lone surrogates
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the conversation cannot be saved: {error}") from None

    def load(self, path: str | Path) -> None:
        """Replace the messages by those of a saved conversation, its system message included.

        Raises `UserError` for a missing or invalid file; the current messages then stay unchanged.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a saved conversation: {error}") from None
        self.messages, self.forgotten = _checked(content, path), 0


def _beginning(messages: Messages) -> Messages:
    """The system message, if there is one."""
    return [message for message in messages[:1] if message["role"] == "system"]


def _checked(content: Any, path: str | Path) -> Messages:
    """The messages of a saved file. Raises `UserError` unless every user message has its answer."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{path}: not a saved conversation: expected {{"messages": […]}}')
    try:
        # With one more question appended, an empty conversation passes and one that ends with a question does not.
        check_messages([*messages, {"role": "user", "content": ""}], add_generation_prompt=True)
    except UserError as error:
        raise UserError(f"{path}: not a saved conversation: {error}") from None
    return messages
