"""The recipe: settings, checks, and which keys may change in the middle of a run."""
