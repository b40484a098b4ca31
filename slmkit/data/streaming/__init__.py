"""Batches from sources that are read during training, with nothing on disk."""
