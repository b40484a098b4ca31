"""Rows of each objective's data."""
