"""Looking at data before the first step, and at one step again."""
