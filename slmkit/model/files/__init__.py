"""A model on disk: config.json, weights in safetensors, adapters, generation_config.json."""
