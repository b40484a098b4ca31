"""Code tasks: candidate programs and their tests run apart, each in a sandbox."""
