"""Text generation: sampling, the generator, streaming, conversations. Names are loaded on first use."""
