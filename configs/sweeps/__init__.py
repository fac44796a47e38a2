"""Sweeps, one file each; see each docstring for its command."""
