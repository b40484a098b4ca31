"""Training: the loop, objectives, optimizers, schedules, checkpoints and run logs."""
