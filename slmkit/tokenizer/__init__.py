"""Text to token ids and back: byte-level BPE, and the chat template that travels with it."""

from slmkit.tokenizer.chat import ChatTokens
from slmkit.tokenizer.tokenizer import SLMTokenizer

__all__ = ["ChatTokens", "SLMTokenizer"]
