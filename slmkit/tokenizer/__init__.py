"""Text to tokens and back: trains a byte-level BPE, loads any `tokenizer.json`, renders chats with a loss mask."""

from slmkit.tokenizer.chat import ChatTokens
from slmkit.tokenizer.tokenizer import SLMTokenizer

__all__ = ["ChatTokens", "SLMTokenizer"]
