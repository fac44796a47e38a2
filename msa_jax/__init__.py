"""MiniMax Sparse Attention for JAX."""
