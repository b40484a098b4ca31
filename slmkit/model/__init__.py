"""The architecture: what a model is made of, how it is initialised, and how it is written to and read from disk."""
