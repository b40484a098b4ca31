"""Chat sessions: message history in, streamed answer out."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

from slmkit.config import UserError, one_line
from slmkit.files import read_text, write_whole
from slmkit.generation.engine import Engine, FinishReason, Request
from slmkit.generation.ensemble import LanguageModel
from slmkit.generation.prompts import Messages, beginning_of, messages_that_fit
from slmkit.generation.sampling import seed_of
from slmkit.generation.sampling_settings import SamplingSettings
from slmkit.generation.text import end_tokens
from slmkit.tokenizer import SLMTokenizer
from slmkit.tokenizer.chat import check_messages


class ChatSession:
    """Keeps the messages of a conversation and streams the model's answers.

    When history and answer exceed the context, the oldest exchanges are dropped (`forgotten` counts
    their messages); the system message is kept. Raises `UserError` for a tokenizer without a chat template, and for a
    system message as `set_system` does.
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
        self.engine = Engine(decoder, tokenizer, max_rows=1)  # keeps what it read of the conversation
        self.max_new_tokens = max_new_tokens
        self.messages: Messages = []
        self.forgotten = 0
        self.tokens = 0  # of the last answer
        self.finish_reason: FinishReason | None = None  # of the last answer; None if it was interrupted
        self._unanswered: str | None = None  # the last question, if it got no answer
        self._retries = 0  # of the last question
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((message["content"] for message in beginning_of(self.messages)), None)

    def set_system(self, text: str | None) -> None:
        """Replace the system message, or with None remove it. The other messages stay.

        Raises `UserError` if the chat template has no place for one, or if it leaves no room in the context.
        """
        beginning = [{"role": "system", "content": text}] if text else []
        self._that_fit([*beginning, {"role": "user", "content": "?"}])
        self.messages = beginning + self.messages[len(beginning_of(self.messages)) :]

    def reset(self) -> None:
        """Delete all messages but the system message."""
        self.messages, self.forgotten, self._unanswered = beginning_of(self.messages), 0, None

    def reply(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to `text`; pieces may be empty. What was generated until the stream ends or is closed is
        added to the messages.

        Raises `UserError` if the message leaves no room for an answer; the messages then stay unchanged.
        """
        self._retries = 0
        yield from self._answer(text)

    def retry(self) -> Generator[str, None, None]:
        """Stream another answer to the last question. It replaces the one before, unless it is empty.

        With a seed, each retry draws by the next seed. Raises `UserError` if nothing was asked, and if sampling is
        greedy, since the answer would be the same.
        """
        if self.settings.is_greedy:
            raise UserError("at temperature 0 the answer is always the same: begin with a higher --temperature")
        before = self.messages, self.forgotten, self._unanswered
        question = self.undo() if self._unanswered is None else self._unanswered
        self._retries += 1
        try:
            yield from self._answer(question)
        finally:
            if self._unanswered is not None:
                self.messages, self.forgotten, self._unanswered = before

    def undo(self) -> str:
        """Take back the last question and its answer. Returns the question; raises `UserError` if there is none."""
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions:
            raise UserError("nothing was asked yet")
        question = self.messages[questions[-1]]["content"]
        self.messages, self._unanswered = self.messages[: questions[-1]], None
        return question

    def _answer(self, question: str) -> Generator[str, None, None]:
        self._unanswered = question
        messages, prompt = self._that_fit([*self.messages, {"role": "user", "content": question}])
        settings = self.settings.model_copy(update={"seed": seed_of(self.settings.seed, self._retries)})
        handle = self.engine.insert(Request(prompt, self.max_new_tokens, settings, end_tokens(self.tokenizer)))
        self.forgotten += len(self.messages) + 1 - len(messages)
        self.messages, self.finish_reason, self.tokens = messages, None, 0
        answer = ""
        try:
            while self.engine.is_busy:
                piece = ""
                for event in self.engine.step():
                    if event.error:
                        raise UserError(event.error)
                    self.finish_reason, self.tokens = event.finish_reason, self.tokens + 1
                    piece = event.text if answer else event.text.lstrip()
                answer += piece
                yield piece
        finally:
            self.engine.remove(handle)
            if answer:
                self.messages.append({"role": "assistant", "content": answer.rstrip()})
                self._unanswered = None
            else:
                self.messages.pop()  # no answer: the template has no empty turns

    def _that_fit(self, messages: Messages) -> tuple[Messages, list[int]]:
        context = self.decoder.max_positions
        # At most a quarter of the context: reserving all of a large `max_new_tokens` would leave none for the history.
        return messages_that_fit(self.tokenizer, messages, context, room=max(1, min(self.max_new_tokens, context // 4)))

    def save(self, path: str | Path) -> None:
        """Write the conversation as one line of JSON (`{"messages": […]}`), the format of fine-tuning data.

        Raises `UserError` if nothing was asked yet, and if it cannot be written; an existing file then stays unchanged.
        """
        if len(self.messages) == len(beginning_of(self.messages)):
            raise UserError("nothing was asked yet, so there is no conversation to save")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            write_whole(Path(path), line.encode("utf-8", "replace").decode())  # terminals may pass lone surrogates
        except FileNotFoundError:
            why = f"there is no folder {Path(path).parent}"
        except OSError as error:
            why = (error.strerror or str(error)).lower()
        except ValueError as error:
            why = str(error)
        else:
            return
        raise UserError(f"{path}: the conversation cannot be saved: {why}")

    def load(self, path: str | Path) -> None:
        """Replace the messages by those of a saved conversation, its system message included.

        Raises `UserError` for a missing or invalid file; the current messages then stay unchanged.
        """
        self.messages, self.forgotten, self._unanswered = _checked(_read(path), path), 0, None


def _read(path: str | Path) -> Any:
    """The JSON in a file. Raises `UserError` for another file, and for several conversations."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        text = read_text(path)
        try:
            return json.loads(text)
        except ValueError:
            if not all(line.lstrip()[:1] in ("{", "") for line in text.split("\n")):
                raise
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a saved conversation: it is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path}: not a saved conversation: JSON that is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not a saved conversation: {one_line(error)}") from None
    raise UserError(f"{path}: it holds {len(lines)} conversations, expected one: copy one line to a file of its own")


def _checked(content: Any, path: str | Path) -> Messages:
    """The messages of a saved file. Raises `UserError` unless every user message has its answer."""
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f'{path}: not a saved conversation: expected {{"messages": […]}}')
    has_begun = any(isinstance(message, dict) and message.get("role") != "system" for message in messages)
    try:
        check_messages(messages if has_begun else [*messages, {"role": "user", "content": ""}])
    except UserError as error:
        raise UserError(f"{path}: not a saved conversation: {error}") from None
    if has_begun and (messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
        raise UserError(f"{path}: message {len(messages)}, the last one, has no answer: add the answer, or remove it")
    return messages
