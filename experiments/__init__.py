"""Experiment entry points; each is a thin script over msa_jax."""
