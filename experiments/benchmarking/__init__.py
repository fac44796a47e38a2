"""What `python -m experiments.benchmark` is made of: cases, inputs, checks, timing, the report."""
