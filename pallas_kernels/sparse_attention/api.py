"""`sparse_attention`: the main branch, exact attention over selected blocks."""

import math
from collections.abc import Callable

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_heads, check_segments, check_selection, check_slots
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.pages import check_pages, contiguous_shape
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import shard_over_batch_heads_and_queries
from pallas_kernels.sparse_attention import mosaic_gpu, mosaic_tpu, reference, triton

IMPLEMENTATIONS = {
    "mosaic_tpu": mosaic_tpu.sparse_attention,
    "mosaic_gpu": mosaic_gpu.sparse_attention,
    "triton": triton.sparse_attention,
    "reference": reference.sparse_attention,
}
# With a keyword more, page_table.
PAGED_IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "mosaic_tpu": mosaic_tpu.sparse_attention,
    "reference": reference.sparse_attention_of_pages,
}


def sparse_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"] | Float[Array, "P Hkv Bk D"],
    v: Float[Array, "B S Hkv D"] | Float[Array, "P Hkv Bk D"],
    selection: BlockSelection,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
    page_table: Int[Array, "B N"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Softmax attention of each query over the visible tokens of its group's selected blocks.

    The G = Hq / Hkv heads of a group share one selection. Differentiable in q, k and v.

    A NaN or infinity in a key or value reaches the queries that see it. Which others it reaches
    depends on the implementation, so keep padding finite: the reference multiplies every value, by
    0 too; on a GPU it stays with the queries that selected the block, or with union tiles with
    them and their neighbours (`docs/kernels.md`, section 5).

    With `page_table`, k and v are pools of P pages of a block each, shared by all rows, and S = N *
    Bk. They are head-major because a group reads its own head of a page alone: one contiguous copy.
    Slots of a page behind its row's last token must be finite too.

    Args:
      q: main queries; head h belongs to group h // G.
      k: main keys, or pages of them.
      v: values, as k.
      selection: from `select_blocks`, for these queries and keys.
      scale: of the scores, 1 / sqrt(D) by default.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      page_table: block n of row b lies in page `page_table[b, n]`; -1 for none, behind the last
        query's block. Not together with `segment_ids`.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The output in q's dtype, and the natural log-sum-exp of the scaled scores in float32. A row
      with nothing visible (padding) has output 0 and log-sum-exp -inf.

    Raises:
      ValueError: shapes that differ, a document off a block boundary, pages of another size than
        the selection's blocks, or pages with segment_ids.
    """
    keys, values = k, v
    if page_table is not None:
        check_pages(page_table, selection.block_size, segment_ids, k=k, v=v)
        keys, values = contiguous_shape(k, page_table), contiguous_shape(v, page_table)
    check_heads(q, keys, values)
    check_slots(q, keys, segment_ids, query_offset)
    check_selection(selection.block_ids, q, keys)
    check_segments(segment_ids, selection.block_size)
    if page_table is None:
        run = dispatch("sparse_attention", IMPLEMENTATIONS, implementation)
    else:
        run = dispatch("sparse_attention of pages", PAGED_IMPLEMENTATIONS, implementation)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def local(q, k, v, block_ids, segment_ids, query_offset, page_table):
        paged = {} if page_table is None else {"page_table": page_table}
        arrays = q, k, v, block_ids, segment_ids, query_offset
        return run(*arrays, **paged, block_size=selection.block_size, scale=scale)

    kv_layout = "b.h." if page_table is None else ".h.."
    layouts = ("bqh.", kv_layout, kv_layout, "bhq.", "b.", "o", "b.")
    sharded = shard_over_batch_heads_and_queries(local, layouts, ("bqh.", "bhq"))
    return sharded(q, k, v, selection.block_ids, segment_ids, query_offset, page_table)
