"""Models for other engines: GGUF, ONNX, model cards. Empty until the first of them stands."""
