"""The gradients of attention over selected blocks: per key block, in chunks of queries.

Every block is visited once per chunk with the queries that picked it, whatever scheme the forward
pass took: dK and dV add up on the way, dQ comes in one partial result per query and block, and
these are added in the order of the query's slots. Nothing is added atomically: the same bits in
every run.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sparse_attention.add_parts_mosaic_gpu import add_parts
from pallas_kernels.sparse_attention.backward_mosaic_gpu import (
    TILE_ROWS,
    GradientConfig,
    block_gradients,
)
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig, combine
from pallas_kernels.sparse_attention.kv_outer import by_tiles, padded_groups, whole_blocks
from pallas_kernels.sparse_attention.reverse_index import (
    GROUP,
    KEY_BLOCK,
    NUM_TILES,
    ReverseIndex,
    max_row_length,
    reverse_index,
)


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Shape of the backward pass.

    Attributes:
      gradient: the kernel per key block; None for the tuned one.
      combine: the kernel that adds the partial results of dQ; None for the tuned one.
      partial_bytes: of device memory that those results may take, but for what fills lists up to
        whole tiles.
      queries_per_chunk: a power of two; by default the most that `partial_bytes` has room for.
    """

    gradient: GradientConfig | None = None
    combine: CombineConfig | None = None
    partial_bytes: int = 2**30
    queries_per_chunk: int | None = None

    def __post_init__(self):
        if self.partial_bytes < 1:
            raise ValueError(f"partial_bytes={self.partial_bytes} must be positive")
        chunk = self.queries_per_chunk
        if chunk is not None and (chunk < TILE_ROWS or chunk & (chunk - 1)):
            raise ValueError(
                f"queries_per_chunk={chunk} must be a power of two from {TILE_ROWS} on"
            )


def backward(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    query_offset: Int[Array, "B"] | int,
    results: tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]],
    cotangents: tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]],
    *,
    block_size: int,
    scale: float,
    config: BackwardConfig,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]:
    """Gradients of queries, keys and values.

    Args:
      q: bfloat16 or float16 queries, at most 64 heads per group.
      k: keys.
      v: values.
      block_ids: each visible to its query, none twice, -1 for nobody.
      query_offset: the key slot of the first query.
      results: output and natural log-sum-exp of the forward pass.
      cotangents: of both.
      block_size: 64 or 128.
      scale: of the scores, positive.
      config: the pass's shape.
    """
    (batch, num_queries, num_heads, head_dim), groups = q.shape, k.shape[2]
    rows = _row_statistics(results, cotangents, groups)
    q, do = (padded_groups(array, groups) for array in (q, cotangents[0]))
    padded_k, padded_v = (whole_blocks(array, block_size) for array in (k, v))
    num_blocks, per_group = padded_k.shape[1] // block_size, q.shape[2] // groups
    flat_q, flat_do, flat_k, flat_v = (
        array.reshape(-1, *array.shape[2:]) for array in (q, do, padded_k, padded_v)
    )
    gradient, merge = config.gradient or GradientConfig(), config.combine or CombineConfig()
    chunk = _chunk_length(config, q, block_ids.shape[3], num_blocks)
    num_chunks = -(-num_queries // chunk)
    padding = num_chunks * chunk - num_queries
    block_ids = jnp.pad(block_ids, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=-1)
    first_slots = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    first_queries = jnp.arange(batch, dtype=jnp.int32) * num_queries
    dq_sums = jax.empty_ref(
        jax.ShapeDtypeStruct((batch * num_chunks * chunk, *flat_q.shape[1:]), q.dtype)
    )
    dk_sums, dv_sums = (
        jax.new_ref(jnp.zeros(array.shape, jnp.float32)) for array in (flat_k, flat_v)
    )

    def differentiate(start):
        index = reverse_index(
            jax.lax.dynamic_slice_in_dim(block_ids, start, chunk, axis=2),
            first_queries + start,
            first_slots + start,
            num_blocks=num_blocks,
            block_size=block_size,
            queries_per_row=chunk,
            queries_per_tile=TILE_ROWS // per_group,
            tiles_per_slice=gradient.tiles_per_slice,
        )
        index = index._replace(queries=filled_tiles(index.queries, TILE_ROWS // per_group))
        partial, parts = block_gradients(
            flat_q,
            flat_do,
            flat_k,
            flat_v,
            statistics_by_tile(rows, index, (batch, groups, num_blocks)),
            index,
            dk_sums,
            dv_sums,
            block_size=block_size,
            scale=scale,
            config=gradient,
        )
        add_parts(parts, index.slices, dk_sums, dv_sums)
        # Of weight 1 each.
        places, weights = by_tiles(index.places, jnp.zeros(partial.shape[:2], jnp.float32))
        combine(partial, places, weights, dq_sums, start, config=merge, normalized=False)

    if num_chunks == 1:
        differentiate(jnp.int32(0))
    else:
        starts = jnp.arange(num_chunks, dtype=jnp.int32) * chunk
        jax.lax.scan(lambda _, start: (None, differentiate(start)), None, starts)
    heads = num_heads // groups
    dq = jax.freeze(dq_sums).reshape(batch, -1, groups, per_group, head_dim)
    dq = dq[:, :num_queries, :, :heads].reshape(batch, num_queries, num_heads, head_dim)
    dk = (jax.freeze(dk_sums) * scale).reshape(padded_k.shape)[:, : k.shape[1]].astype(k.dtype)
    dv = jax.freeze(dv_sums).reshape(padded_v.shape)[:, : v.shape[1]].astype(v.dtype)
    return dq, dk, dv


def _chunk_length(
    config: BackwardConfig, q: Float[Array, "B T Hq D"], top_k: int, num_blocks: int
) -> int:
    """Queries per chunk; each batch row and group has them in one row of the reverse index."""
    most = max_row_length(num_blocks, top_k)
    if config.queries_per_chunk is not None:
        return min(config.queries_per_chunk, most)
    batch, num_queries, num_heads, head_dim = q.shape
    bytes_per_query = batch * top_k * num_heads * head_dim * q.dtype.itemsize
    room = max(TILE_ROWS, config.partial_bytes // bytes_per_query)
    whole = max(TILE_ROWS, 1 << (num_queries - 1).bit_length())
    return min(1 << (room.bit_length() - 1), whole, most)


def _row_statistics(results, cotangents, groups: int) -> Float[Array, "2 rows G"]:
    """Per query and group: base-2 log-sum-exp and what is taken from dP, for each head.

    The derivative of the log-sum-exp by a score is the probability P, as that of the output is
    P * (dP - delta): its cotangent joins delta. A row that sees nothing, or is no head, gets an
    infinite log-sum-exp, which makes P 0.
    """
    (o, lse), (do, dlse) = results, cotangents
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - dlse.swapaxes(1, 2)
    lse = lse.swapaxes(1, 2) * math.log2(math.e)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
    delta = padded_groups(delta[..., None], groups)[..., 0]
    per_group = delta.shape[2] // groups
    empty = per_group - lse.shape[2] // groups
    lse = lse.reshape(*lse.shape[:2], groups, -1)
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, 0), (0, empty)), constant_values=jnp.inf)
    return jnp.stack((lse.reshape(-1, per_group), delta.reshape(-1, per_group)))


def filled_tiles(queries: Int[Array, "P"], per_tile: int) -> Int[Array, "P"]:
    """`ReverseIndex.queries` with a tile's last query where nobody is.

    Any query would do, for its gradients there are 0, unless it holds a NaN: so it is one whose NaN
    is in this tile anyway.
    """
    # A list ascends, and row 0 stands where it has ended.
    return jax.lax.cummax(queries.reshape(-1, per_tile), axis=1).reshape(-1)


def statistics_by_tile(
    rows: Float[Array, "2 rows G"], index: ReverseIndex, sizes: tuple[int, int, int]
) -> Float[Array, "tiles 2 tile_rows"]:
    """The statistics in the order of the index's tiles; where nobody is, infinity and 0.

    Args:
      rows: log-sum-exp and what is taken from dP, per query and group, the groups of a query side
        by side.
      index: with one row of queries per batch row and group, so that its tiles lie in their order.
      sizes: batch rows, groups, and key blocks per batch row.
    """
    queries = index.queries.reshape(-1, TILE_ROWS // rows.shape[2])
    group = _groups_of_tiles(index, len(queries), sizes)[:, None]
    at = queries * sizes[1] + group
    lse, delta = rows.at[:, at].get(mode="promise_in_bounds")
    used = _used(queries)[..., None]
    statistics = jnp.where(used, lse, jnp.inf), jnp.where(used, delta, 0)
    return jnp.stack([array.reshape(-1, TILE_ROWS) for array in statistics], axis=1)


def _used(queries: Int[Array, "tiles R"]) -> Bool[Array, "tiles R"]:
    """Whether somebody is at a place: a list ascends, and does not where it has ended."""
    return jnp.pad(queries[:, 1:] > queries[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _groups_of_tiles(
    index: ReverseIndex, num_tiles: int, sizes: tuple[int, int, int]
) -> Int[Array, "tiles"]:
    """The group of each tile that a slice has."""
    (batch, groups, num_blocks), slices = sizes, index.slices
    row = slices[:, KEY_BLOCK] // num_blocks * groups + slices[:, GROUP]
    in_use = jnp.arange(len(slices), dtype=jnp.int32) < index.num_slices
    tiles = jnp.where(in_use, slices[:, NUM_TILES], 0)
    # Where each row's tiles end, by comparing with all slices: there are few rows.
    rows = jnp.arange(batch * groups, dtype=jnp.int32)[:, None]
    ends = jnp.where(row <= rows, tiles, 0).sum(1, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)[:, None]
    # Tiles that no slice has come behind all rows.
    return jnp.minimum((tile >= ends).sum(1, dtype=jnp.int32), batch * groups - 1) % groups
