"""What changes a built model: LoRA, merging, quantization. Empty until the first of them stands."""
