"""Memory, time, disk and loss of a run before it starts."""
