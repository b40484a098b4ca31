"""Text and conversations to token shards."""
