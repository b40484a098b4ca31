"""Run logs: metrics, plots, progress, trackers, lists of runs."""
