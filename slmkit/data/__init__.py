"""From raw text to batches: sources, token shards, packing, mixtures and batches."""
