"""Changes of built models: LoRA, merging, quantization. The names below are imported at first use."""
