"""From logits to text: sampling, the generator, streaming, conversations."""

from slmkit.generation.chat import ChatSession
from slmkit.generation.ensemble import Ensemble, common_tokenizer, together
from slmkit.generation.generator import FinishReason, IdStream, generate_ids
from slmkit.generation.language_model import LanguageModel
from slmkit.generation.sampling import SamplingSettings
from slmkit.generation.text import Continuation, TextStream, complete, stream_completion

__all__ = [
    "ChatSession",
    "Continuation",
    "Ensemble",
    "FinishReason",
    "IdStream",
    "LanguageModel",
    "SamplingSettings",
    "TextStream",
    "common_tokenizer",
    "complete",
    "generate_ids",
    "stream_completion",
    "together",
]
