"""`select_blocks` and `select_pattern`: which key blocks each query and KV group attends to."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_blocks,
    check_heads,
    check_index,
    check_segments,
    check_slots,
)
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.pages import check_pages, contiguous_shape
from pallas_kernels.select_blocks import mosaic_gpu, mosaic_tpu, patterns, reference, triton
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import shard_over_batch_heads_and_queries

POOLINGS = ("max", "lse", "mean")
INDEX_PRECISIONS = ("native", "int8")
IMPLEMENTATIONS = {
    "mosaic_tpu": mosaic_tpu.select_blocks,
    "mosaic_gpu": mosaic_gpu.select_blocks,
    "triton": triton.select_blocks,
    "reference": reference.select_blocks,
}
# With a keyword more, page_table.
PAGED_IMPLEMENTATIONS = {
    "mosaic_tpu": mosaic_tpu.select_blocks,
    "reference": reference.select_blocks_of_pages,
}


def select_blocks(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"] | Float[Array, "P Bk Di"],
    *,
    block_size: int = 128,
    top_k: int = 16,
    num_local_blocks: int = 1,
    num_sink_blocks: int = 0,
    pooling: str = "max",
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
    page_table: Int[Array, "B N"] | None = None,
    index_precision: str = "native",
    implementation: Implementation = None,
) -> BlockSelection:
    """Selects the K key blocks that each query of each KV group attends to (arXiv 2606.13392).

    Token scores are index_q . index_k * scale in float32, masked to what the query sees, then
    pooled per block; a block with a NaN token score counts as -inf. The forced blocks are always
    kept; the rest are the best others by score descending, then lower block id. -0 equals +0, and a
    block whose score is -inf is never chosen. Groups select independently. There is no gradient.

    With `page_table`, index_k is a pool of P pages of a block each, shared by all rows, and S = N *
    Bk.

    Args:
      index_q: index queries, one light head per KV group.
      index_k: index keys, one head shared by all groups, or pages of them.
      block_size: Bk, tokens per block.
      top_k: K, blocks kept, the forced ones included.
      num_local_blocks: the query's own block and the ones just before it, always kept; >= 1.
      num_sink_blocks: leading blocks of the document, always kept.
      pooling: "max", "lse" or "mean" of a block's visible token scores.
      scale: of the scores, 1 / sqrt(Di) by default; it matters to "lse" pooling only.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
        Documents start on multiples of `block_size`.
      query_offset: the key slot of the first query, per row or for all.
      page_table: block n of row b lies in page `page_table[b, n]`; -1 for none, behind the last
        query's block. Not together with `segment_ids`.
      index_precision: "native" multiplies index_q and index_k as they are, "int8" rounds them to
        8-bit integers with one scale per query and one per key block: about twice as fast on the
        tensor cores, and no longer the same selection.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The selection, block_ids [B, Hkv, T, K]; a padding query selects nothing.

    Raises:
      ValueError: an option out of range, a document off a block boundary, shapes that differ, pages
        of another size than the blocks, or pages with segment_ids.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: choose one of {', '.join(POOLINGS)}")
    if index_precision not in INDEX_PRECISIONS:
        raise ValueError(
            f"index_precision={index_precision!r}: choose one of {', '.join(INDEX_PRECISIONS)}"
        )
    keys = index_k
    if page_table is not None:
        check_pages(page_table, block_size, segment_ids, index_k=index_k)
        keys = contiguous_shape(index_k, page_table)
    check_index(index_q, keys)
    check_blocks(block_size, top_k, num_local_blocks, num_sink_blocks)
    check_slots(index_q, keys, segment_ids, query_offset)
    check_segments(segment_ids, block_size)
    if page_table is None:
        run = dispatch("select_blocks", IMPLEMENTATIONS, implementation)
    else:
        run = dispatch("select_blocks of pages", PAGED_IMPLEMENTATIONS, implementation)

    def local(index_q, index_k, segment_ids, query_offset, page_table):
        paged = {} if page_table is None else {"page_table": page_table}
        arrays = index_q, index_k, segment_ids, query_offset
        ids = run(
            *arrays,
            **paged,
            block_size=block_size,
            top_k=top_k,
            num_local_blocks=num_local_blocks,
            num_sink_blocks=num_sink_blocks,
            pooling=pooling,
            scale=1 / math.sqrt(index_q.shape[-1]) if scale is None else scale,
            index_precision=index_precision,
        )
        return (ids,)

    layouts = ("bqh.", "b.." if page_table is None else "...", "b.", "o", "b.")
    sharded = shard_over_batch_heads_and_queries(local, layouts, ("bhq.",))
    detached = jax.lax.stop_gradient((index_q, index_k))
    (block_ids,) = sharded(*detached, segment_ids, query_offset, page_table)
    return BlockSelection(block_ids, block_size)


def select_pattern(
    pattern: str,
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    *,
    block_size: int = 128,
    top_k: int = 16,
    num_local_blocks: int = 1,
    num_sink_blocks: int = 0,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
) -> BlockSelection:
    """Selects blocks without an index branch, for baselines and analysis.

    Args:
      pattern: how the blocks that are not forced are chosen. "sink_window" keeps the nearest, so
        that the first `num_sink_blocks` and a window remain; "strided" spreads them evenly over the
        document's past; "random" draws them per query and group, "random_per_block" per block of
        queries and group, both the same in every call; "oracle" keeps those with the most dense
        main-branch attention, at the cost of a dense pass.
      q: main queries; patterns other than the oracle read their shape alone.
      k: main keys.
      block_size: Bk, tokens per block.
      top_k: K, blocks kept, the forced ones included.
      num_local_blocks: see `select_blocks`.
      num_sink_blocks: see `select_blocks`.
      scale: of the main scores, 1 / sqrt(D) by default.
      segment_ids: see `select_blocks`.
      query_offset: see `select_blocks`.

    Returns:
      The selection, as of `select_blocks`.

    Raises:
      ValueError: an unknown pattern, or as `select_blocks`.
    """
    if pattern not in patterns.PATTERNS:
        raise ValueError(f"pattern={pattern!r}: choose one of {', '.join(patterns.PATTERNS)}")
    check_heads(q, k)
    check_blocks(block_size, top_k, num_local_blocks, num_sink_blocks)
    check_slots(q, k, segment_ids, query_offset)
    check_segments(segment_ids, block_size)

    def local(*arrays):
        ids = patterns.select_pattern(
            *arrays,
            pattern=pattern,
            block_size=block_size,
            top_k=top_k,
            num_local_blocks=num_local_blocks,
            num_sink_blocks=num_sink_blocks,
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        )
        return (ids,)

    sharded = shard_over_batch_heads_and_queries(local, ("bqh.", "b.h.", "h", "b.", "o"), ("bhq.",))
    groups = jnp.arange(k.shape[2], dtype=jnp.int32)
    (block_ids,) = sharded(*jax.lax.stop_gradient((q, k)), groups, segment_ids, query_offset)
    return BlockSelection(block_ids, block_size)


def main_block_mass(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
) -> Float[Array, "B Hkv T N"]:
    """Share of dense main-branch attention in each key block, the mean over a group's heads.

    What selection is measured against. Costs a dense pass. Arguments and errors as
    `select_pattern`; a row sums to 1, or to 0 for padding.
    """
    check_heads(q, k)
    check_slots(q, k, segment_ids, query_offset)
    check_segments(segment_ids, block_size)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def local(*arrays):
        return (reference.main_block_mass(*arrays, block_size=block_size, scale=scale),)

    sharded = shard_over_batch_heads_and_queries(local, ("bqh.", "b.h.", "b.", "o"), ("bhq.",))
    return sharded(q, k, segment_ids, query_offset)[0]
