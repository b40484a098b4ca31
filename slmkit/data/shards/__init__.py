"""Token shards on disk: their format, writing, reading, shuffling."""
