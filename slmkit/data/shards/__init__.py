"""Token shards on disk: format, writing, reading, shuffling."""
