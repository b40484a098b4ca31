"""The built-in chat templates and their special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from slmkit.config import UserError, did_you_mean

TEMPLATES = Path(__file__).with_name("templates")


class ChatFormat(NamedTuple):
    """A template, the special tokens that it writes, and its beginning-of-text token."""

    template: str | None
    tokens: tuple[str, ...] = ()
    bos_token: str | None = None


# ChatML is OpenAI's, also used by Qwen and SmolLM; the others are Meta's and Google's.
TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
}
BEGINNINGS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}


def find_format(name: str) -> ChatFormat:
    """The format `chatml`, `llama3` or `gemma`, or the one in a Jinja file, whose special tokens are unknown.

    Raises `UserError` for another name and for a file that cannot be read.
    """
    if name in TOKENS:
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        return ChatFormat(template, TOKENS[name], BEGINNINGS.get(name))
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"chat_template {name!r}: no file, and no template that comes with slmkit; {did_you_mean(name, TOKENS)}"
        )
    try:
        return ChatFormat(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a chat template: {error}") from None
