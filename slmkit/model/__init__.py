"""The architecture: decoder, configs, initialisation, and files on disk."""
