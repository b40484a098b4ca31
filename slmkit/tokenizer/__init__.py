"""Text to tokens and back: train a byte-level BPE, load any `tokenizer.json`, render conversations with a loss mask."""

from slmkit.tokenizer.chat import ChatTokens
from slmkit.tokenizer.tokenizer import SLMTokenizer

__all__ = ["ChatTokens", "SLMTokenizer"]
