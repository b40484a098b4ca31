"""From logits to text: sampling, the generator, streaming, conversations."""

from slmkit.generation.chat import ChatSession
from slmkit.generation.generator import generate_ids
from slmkit.generation.sampling import SamplingSettings
from slmkit.generation.text import Continuation, complete, stream_completion

__all__ = ["ChatSession", "Continuation", "SamplingSettings", "complete", "generate_ids", "stream_completion"]
