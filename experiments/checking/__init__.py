"""What `python -m experiments.check_kernels` is made of: cases, float64 oracles, the judgement."""
