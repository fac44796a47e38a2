"""Experiment configurations, one file per model; see each docstring for its command."""
