"""Export of models: the model card. GGUF and ONNX are still to come."""
