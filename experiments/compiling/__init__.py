"""What `experiments.compile_check` is made of."""
