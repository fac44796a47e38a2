"""Evaluation: what a run learned, and the report that shows it."""
