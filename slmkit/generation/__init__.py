"""From logits to text: sampling, the generator, streaming, conversations."""

from slmkit.generation.chat import ChatSession
from slmkit.generation.generator import FinishReason, IdStream, generate_ids
from slmkit.generation.sampling import SamplingSettings
from slmkit.generation.text import Continuation, TextStream, complete, stream_completion

__all__ = [
    "ChatSession",
    "Continuation",
    "FinishReason",
    "IdStream",
    "SamplingSettings",
    "TextStream",
    "complete",
    "generate_ids",
    "stream_completion",
]
