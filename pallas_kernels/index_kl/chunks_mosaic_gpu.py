"""A call of `index_kl` as the Hopper kernels take it, and its cut into chunks of queries.

What the kernels write per query and block is large: chunks bound it, whatever the length.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.align_mosaic_gpu import STUDENT_LSE, WEIGHT
from pallas_kernels.index_kl.tiles import (
    NOBODY,
    TILE_QUERIES,
    Tiles,
    by_row,
    dense_tiles,
    selected_tiles,
)
from pallas_kernels.index_kl.tiles_mosaic_gpu import STEP_ROWS, TEACHER_SHIFT, Scales, TileInputs
from pallas_kernels.sparse_attention.reverse_index import max_row_length, row_length
from pallas_kernels.visibility import visible_block_ids

_LOG2_E = math.log2(math.e)


class Call(NamedTuple):
    """The arrays of one call; W is the larger of head and index dim, zeros fill the other.

    Attributes:
      q: [queries, Hkv * G, W], the rows of the batch one after the other; G of 8, 16, 32 or 64.
      k: [keys, Hkv, W], whole blocks per batch row.
      index_q: [queries, Hkv, W].
      index_k: [keys, W].
      lse: [queries, Hkv, G], see `TileInputs`.
      offsets: [B] key slot of each row's first query.
      block_ids: visible and distinct, else -1; None for the causal prefix.
      num_blocks: per batch row.
      scales: what kernels are compiled for.
    """

    q: Float[Array, "queries Hq W"]
    k: Float[Array, "keys Hkv W"]
    index_q: Float[Array, "queries Hkv W"]
    index_k: Float[Array, "keys W"]
    lse: Float[Array, "queries Hkv G"]
    offsets: Int[Array, "B"]
    block_ids: Int[Array, "B Hkv T K"] | None
    num_blocks: int
    scales: Scales

    @property
    def batch(self) -> int:
        """Batch rows."""
        return len(self.offsets)

    @property
    def num_queries(self) -> int:
        """Per batch row."""
        return len(self.q) // self.batch

    @property
    def num_key_blocks(self) -> int:
        """In all batch rows."""
        return self.batch * self.num_blocks


class Chunks(NamedTuple):
    """How many chunks, queries per chunk, and per row of the reverse index, which divides that."""

    number: int
    length: int
    queries_per_row: int


def as_kernels_take(
    scales: Scales, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset
) -> Call:
    """Pads heads, dims and keys; arguments as of `index_kl`, `offset` an array or a number."""
    batch, num_queries, _, head_dim = q.shape
    groups, heads = k.shape[2], scales.num_heads
    width = max(head_dim, index_q.shape[-1])
    num_blocks = -(-k.shape[1] // scales.block_size)
    behind = (0, num_blocks * scales.block_size - k.shape[1])
    no_heads = (0, max(8, 1 << (heads - 1).bit_length()) - heads)
    q = q.reshape(batch, num_queries, groups, heads, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), no_heads, (0, 0)))
    lse = main_lse.reshape(batch, groups, heads, num_queries).astype(jnp.float32)
    # Where a head is none its probabilities are 0.
    lse = jnp.pad(lse, ((0, 0), (0, 0), no_heads, (0, 0)), constant_values=jnp.inf)
    lse = jnp.moveaxis(lse * _LOG2_E - TEACHER_SHIFT, 3, 1)
    if block_ids is not None:
        block_ids = visible_block_ids(block_ids, segment_ids, offset, scales.block_size)
    return Call(
        _flat(q.reshape(batch, num_queries, -1, head_dim), width),
        _flat(jnp.pad(k, ((0, 0), behind, (0, 0), (0, 0))), width),
        _flat(index_q, width),
        _flat(jnp.pad(index_k, ((0, 0), behind, (0, 0))), width),
        lse.reshape(-1, *lse.shape[2:]),
        jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,)),
        block_ids,
        num_blocks,
        scales,
    )


def _flat(array: Float[Array, "B length *rest dim"], width: int) -> Float[Array, "rows *rest W"]:
    """Rows of all batch rows after each other, with zeros up to `width`."""
    missing = width - array.shape[-1]
    array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
    return array.reshape(-1, *array.shape[2:])


def cut(
    call: Call, result_bytes: int, chunk_bytes: int, queries_per_row: int | None
) -> tuple[Call, Chunks]:
    """Whole rows of the reverse index per chunk, evenly spread, and one at least.

    Args:
      call: see there.
      result_bytes: that a kernel writes per tile.
      chunk_bytes: that a chunk's results and its queries' copies by row may take.
      queries_per_row: None for twice what `row_length` chooses; of no use without block ids.

    Returns:
      The call, whose block ids now fill the last chunk, and the chunks.
    """
    groups, heads, width = call.k.shape[1], call.lse.shape[-1], call.q.shape[-1]
    # Index query, log-sum-exps, factors of the gradient, number.
    row_tile_bytes = TILE_QUERIES * (width * call.q.dtype.itemsize + heads * 4 + 16)
    if call.block_ids is None:
        row = TILE_QUERIES
        row_bytes = call.batch * groups * (call.num_blocks * result_bytes + row_tile_bytes)
    else:
        top_k = call.block_ids.shape[3]
        row = queries_per_row or _row_length(call, top_k)
        entries = row * top_k * groups * call.batch
        tiles = -(-entries // TILE_QUERIES) + min(call.num_key_blocks * groups, entries)
        row_bytes = tiles * (result_bytes + row_tile_bytes)
    most = max(1, chunk_bytes // row_bytes) * row
    number = -(-call.num_queries // most)
    length = -(-call.num_queries // (number * row)) * row
    if call.block_ids is not None:
        behind = (0, number * length - call.num_queries)
        padding = ((0, 0), (0, 0), behind, (0, 0))
        block_ids = jnp.pad(call.block_ids, padding, constant_values=-1)
        call = call._replace(block_ids=block_ids)
    return call, Chunks(number, length, row)


def _row_length(call: Call, top_k: int) -> int:
    """Twice as long as for tiles of fewer queries: half-full tiles become fewer."""
    row = row_length(call.num_queries, call.num_blocks, top_k)
    if row >= call.num_queries:
        return row
    return min(2 * row, max_row_length(call.num_blocks, top_k))


def chunk_tiles(call: Call, chunks: Chunks, start: Int[Array, ""]) -> Tiles:
    """Tiles of the chunk that starts with this query."""
    first_query = jnp.arange(call.batch, dtype=jnp.int32) * call.num_queries + start
    place = first_query, call.offsets + start
    blocks = {"num_blocks": call.num_blocks, "block_size": call.scales.block_size}
    if call.block_ids is None:
        left, groups = call.num_queries - start, call.k.shape[1]
        return dense_tiles(*place, left, num_queries=chunks.length, groups=groups, **blocks)
    block_ids = jax.lax.dynamic_slice_in_dim(call.block_ids, start, chunks.length, axis=2)
    return selected_tiles(block_ids, *place, queries_per_row=chunks.queries_per_row, **blocks)


def tile_inputs(call: Call, tiles: Tiles) -> TileInputs:
    """The kernels' arrays for a chunk's tiles."""
    lse = by_row(call.lse, tiles, jnp.inf).reshape(len(tiles.queries), -1, STEP_ROWS)
    return TileInputs(call.q, call.k, by_row(call.index_q, tiles, 0.0), call.index_k, lse)


def tile_factors(
    call: Call,
    chunks: Chunks,
    tiles: Tiles,
    start: Int[Array, ""],
    lse: Float[Array, "B Hkv length"],
    weights: Float[Array, "B Hkv T"],
) -> Float[Array, "R factors 64"]:
    """The factors of `align_tiles` by row; `lse` is of the chunk's queries, `weights` of all."""

    def of_queries(array):
        return jnp.moveaxis(array, 1, 2).reshape(-1, array.shape[1])

    batch_row, query = jnp.divmod(tiles.queries, call.num_queries)
    # As the chunk numbers its queries.
    within = jnp.where(tiles.queries >= 0, batch_row * chunks.length + query - start, NOBODY)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # no probability is of a query without keys
    factors = {
        STUDENT_LSE: by_row(of_queries(lse), tiles._replace(queries=within), 0.0),
        WEIGHT: by_row(of_queries(weights), tiles, 0.0) * call.scales.index_scale,
    }
    return jnp.stack([factors[i] for i in range(len(factors))], axis=1)


def scan_chunks(
    add: Callable[[Any, jax.Array], tuple[Any, Any]], carry: Any, chunks: Chunks
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `add` over the chunks' first queries; a single chunk needs no loop."""
    if chunks.number == 1:
        carry, result = add(carry, jnp.int32(0))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(add, carry, jnp.arange(chunks.number, dtype=jnp.int32) * chunks.length)


def joined(
    results: Float[Array, "chunks B Hkv length *rest"], num_queries: int
) -> Float[Array, "B Hkv T *rest"]:
    """The chunks' results one after the other, less what was added to fill the last."""
    results = jnp.moveaxis(results, 0, 2)
    merged = results.reshape(*results.shape[:2], -1, *results.shape[4:])
    return merged[:, :, :num_queries]
