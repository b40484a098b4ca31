"""Cleaning of a corpus: leaves out duplicates, near-duplicates, unusual texts and evaluation text."""
