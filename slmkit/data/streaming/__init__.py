"""Batches from sources that are read while training runs, with nothing on disk."""
