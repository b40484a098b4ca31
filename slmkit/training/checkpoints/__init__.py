"""Checkpoints: writing them asynchronously, finding and loading them."""
