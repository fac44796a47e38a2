"""Array-level operations of MiniMax Sparse Attention."""
