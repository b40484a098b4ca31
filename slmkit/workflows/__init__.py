"""What a command does, as functions: train, resume, replay, plan, merge, quickstart."""
