"""One loop for every objective, and what it needs: optimizers, schedules, checkpoints, the run log."""
