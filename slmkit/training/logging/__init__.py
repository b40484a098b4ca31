"""What a run writes for people: metrics, plots, progress, trackers, lists of runs."""
