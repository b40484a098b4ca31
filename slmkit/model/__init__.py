"""The architecture: what a model is made of, how it is initialised, and how it is written to and read from disk."""

from slmkit.model.cache import KVCache
from slmkit.model.config import SLMConfig
from slmkit.model.decoder import Decoder
from slmkit.model.directory import load_decoder, save_decoder
from slmkit.model.initialization import build_decoder

__all__ = ["Decoder", "KVCache", "SLMConfig", "build_decoder", "load_decoder", "save_decoder"]
