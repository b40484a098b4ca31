"""What changes a built model: LoRA, merging, quantization. The names below are loaded when they are first used."""
