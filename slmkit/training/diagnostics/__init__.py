"""Checks of the data before training, and replay of one step."""
