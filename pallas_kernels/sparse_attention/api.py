"""`sparse_attention`: the main branch, exact attention over selected blocks."""

import math

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_heads, check_segments, check_selection, check_slots
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import shard_over_batch_heads_and_queries
from pallas_kernels.sparse_attention import mosaic_gpu, reference, triton

# Triton comes behind what always serves, for its kernels have not run on a GPU yet: by name only.
IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.sparse_attention,
    "reference": reference.sparse_attention,
    "triton": triton.sparse_attention,
}


def sparse_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    selection: BlockSelection,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Softmax attention of each query over the visible tokens of its group's selected blocks.

    The G = Hq / Hkv heads of a group share one selection. Differentiable in q, k and v.

    A NaN or infinity in a key or value reaches the queries that see it. Which others it reaches
    depends on the implementation, so keep padding finite: the reference multiplies every value, by
    0 too; on a GPU it stays with the queries that selected the block, or with union tiles with
    them and their neighbours (`docs/kernels.md`, section 5).

    Args:
      q: main queries; head h belongs to group h // G.
      k: main keys.
      v: values.
      selection: from `select_blocks`, for these queries and keys.
      scale: of the scores, 1 / sqrt(D) by default.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The output in q's dtype, and the natural log-sum-exp of the scaled scores in float32. A row
      with nothing visible (padding) has output 0 and log-sum-exp -inf.

    Raises:
      ValueError: shapes that differ, or a document off a block boundary.
    """
    check_heads(q, k, v)
    check_slots(q, k, segment_ids, query_offset)
    check_selection(selection.block_ids, q, k)
    check_segments(segment_ids, selection.block_size)
    run = dispatch("sparse_attention", IMPLEMENTATIONS, implementation)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def local(*arrays):
        return run(*arrays, block_size=selection.block_size, scale=scale)

    layouts = ("bqh.", "b.h.", "b.h.", "bhq.", "b.", "o")
    sharded = shard_over_batch_heads_and_queries(local, layouts, ("bqh.", "bhq"))
    return sharded(q, k, v, selection.block_ids, segment_ids, query_offset)
