"""Array-level operations of MiniMax Sparse Attention (arXiv 2606.13392).

Pure functions of arrays, with gradients; they know nothing of models. See `docs/architecture.md`
for the letters of the shapes and for `implementation=`.
"""

from pallas_kernels.dense_attention.api import dense_attention
from pallas_kernels.index_kl.api import IndexKL, index_kl
from pallas_kernels.select_blocks.api import main_block_mass, select_blocks, select_pattern
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sparse_attention.api import sparse_attention

__all__ = [
    "BlockSelection",
    "IndexKL",
    "dense_attention",
    "index_kl",
    "main_block_mass",
    "select_blocks",
    "select_pattern",
    "sparse_attention",
]
