"""From raw text to batches: sources, token shards, packing, and the stream that feeds the model."""
