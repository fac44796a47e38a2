"""The gradients of attention over selected blocks: per key block, in chunks of queries.

Every block is visited once per chunk with the queries that picked it, whatever scheme the forward
pass took: dK and dV add up on the way, dQ comes in one partial result per query and block, and
these are added in the order of the query's slots. Nothing is added atomically: the same bits in
every run.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sparse_attention.add_parts_mosaic_gpu import add_parts
from pallas_kernels.sparse_attention.backward_mosaic_gpu import (
    TILE_ROWS,
    GradientConfig,
    block_gradients,
)
from pallas_kernels.sparse_attention.chunks_mosaic_gpu import Chunk, Chunks, for_each_chunk
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig, combine
from pallas_kernels.sparse_attention.kv_outer import by_tiles, padded_groups, whole_blocks
from pallas_kernels.sparse_attention.reverse_index import (
    GROUP,
    KEY_BLOCK,
    NUM_TILES,
    ReverseLists,
    max_row_length,
    slices_of,
)
from pallas_kernels.sparse_attention.union_mosaic_gpu import padded_group

# Twice as many gain 3 % with the room for them, half as many cost 7 % (128K tokens on an H100).
_QUERIES_PER_CHUNK = 8192


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Shape of the backward pass.

    Attributes:
      gradient: the kernel per key block; None for the tuned one.
      combine: the kernel that adds the partial results of dQ; None for the tuned one.
      partial_bytes: of device memory that those results may take, but for what fills lists up to
        whole tiles.
      queries_per_chunk: a power of two, see `backward_chunks`, which chooses it by default.
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


def backward_chunks(
    config: BackwardConfig, q: Float[Array, "B T Hq D"], groups: int, top_k: int, num_blocks: int
) -> Chunks:
    """The cut of a gradient's passes: rows as long as a chunk, so that a block has one list.

    Long chunks have few visits of a block, each of which adds to dK and dV in memory; they have
    fewer groups instead.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    per_query = batch * top_k * padded_group(num_heads // groups) * head_dim * q.dtype.itemsize
    most = min(max_row_length(num_blocks, top_k), max(TILE_ROWS, _power_of_two(num_queries)))
    room = config.partial_bytes // per_query  # for queries of one group
    length = min(config.queries_per_chunk or _QUERIES_PER_CHUNK, most)
    if config.queries_per_chunk is None:
        while TILE_ROWS < length > room:
            length //= 2
        while length < most and room >= 2 * length * groups:
            length *= 2
    fit = max(1, room // length)
    per_chunk = max(n for n in range(1, groups + 1) if groups % n == 0 and n <= fit)
    return Chunks(-(-num_queries // length), length, length, groups // per_chunk)


def _power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


def backward(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    lists: ReverseLists,
    results: tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]],
    cotangents: tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]],
    *,
    chunks: Chunks,
    block_size: int,
    scale: float,
    config: BackwardConfig,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]:
    """Gradients of queries, keys and values.

    Args:
      q: bfloat16 or float16 queries, at most 64 heads per group.
      k: keys.
      v: values.
      lists: of all chunks, by `chunk_lists`.
      results: output and natural log-sum-exp of the forward pass.
      cotangents: of both.
      chunks: what `backward_chunks` says.
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
    per_tile = TILE_ROWS // per_group
    index = slices_of(
        lists,
        queries_per_tile=per_tile,
        tiles_per_slice=gradient.tiles_per_slice,
        thread_blocks=gradient.num_thread_blocks,
    )
    index = index._replace(queries=filled_tiles(index.queries, per_tile))
    length = chunks.number * chunks.length
    dq_sums = jax.empty_ref(jax.ShapeDtypeStruct((batch * length, *flat_q.shape[1:]), q.dtype))
    # Behind a barrier, or XLA makes one array of zeros that compare equal, and both sums in it.
    zeros = [jnp.zeros(array.shape, jnp.float32) for array in (flat_k, flat_v)]
    dk_sums, dv_sums = map(jax.new_ref, jax.lax.optimization_barrier(zeros))
    sizes = Sizes(batch, groups // chunks.parts, num_blocks, groups)

    def differentiate(chunk):
        partial, parts = block_gradients(
            flat_q,
            flat_do,
            flat_k,
            flat_v,
            statistics_by_tile(rows, chunk, sizes),
            chunk.index,
            dk_sums,
            dv_sums,
            block_size=block_size,
            scale=scale,
            config=gradient,
        )
        add_parts(parts, chunk.index.slices, dk_sums, dv_sums)
        # Log-sum-exps of 0: of weight 1 each.
        lse = jnp.zeros(partial.shape[:2], jnp.float32)
        places, weights = by_tiles(chunk.index.places, lse)
        place = chunk.start, chunk.first_group
        combine(partial, places, weights, dq_sums, *place, config=merge, normalized=False)

    for_each_chunk(differentiate, chunks, groups, index)
    heads = num_heads // groups
    dq = jax.freeze(dq_sums).reshape(batch, -1, groups, per_group, head_dim)
    dq = dq[:, :num_queries, :, :heads].reshape(batch, num_queries, num_heads, head_dim)
    dk = (jax.freeze(dk_sums) * scale).reshape(padded_k.shape)[:, : k.shape[1]].astype(k.dtype)
    dv = jax.freeze(dv_sums).reshape(padded_v.shape)[:, : v.shape[1]].astype(v.dtype)
    return dq, dk, dv


def _row_statistics(
    results, cotangents, groups: int
) -> tuple[Float[Array, "rows G"], Float[Array, "rows G"]]:
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
    return lse.reshape(-1, per_group), delta.reshape(-1, per_group)


def filled_tiles(queries: Int[Array, "*chunks P"], per_tile: int) -> Int[Array, "*chunks P"]:
    """`ReverseIndex.queries` with a tile's last query where nobody is.

    Any query would do, for its gradients there are 0, unless it holds a NaN: so it is one whose NaN
    is in this tile anyway.
    """
    # A list ascends, and row 0 stands where it has ended.
    return jax.lax.cummax(queries.reshape(-1, per_tile), axis=1).reshape(queries.shape)


class Sizes(NamedTuple):
    """Batch rows, KV groups of a chunk, key blocks per batch row, and KV groups in all."""

    batch: int
    groups: int
    num_blocks: int
    all_groups: int


def statistics_by_tile(
    rows: tuple[Float[Array, "rows G"], Float[Array, "rows G"]], chunk: Chunk, sizes: Sizes
) -> Float[Array, "tiles 2 tile_rows"]:
    """The statistics in the order of a chunk's tiles; where nobody is, infinity and 0.

    Args:
      rows: log-sum-exp and what is taken from dP, per query and group, the groups of a query side
        by side.
      chunk: with one row of queries per batch row and group, so that its tiles lie in their order.
      sizes: see there.
    """
    queries = chunk.index.queries.reshape(-1, TILE_ROWS // rows[0].shape[1])
    group = _groups_of_tiles(chunk, len(queries), sizes)[:, None]
    at = queries * sizes.all_groups + group
    lse, delta = (array.at[at].get(mode="promise_in_bounds") for array in rows)
    used = _used(queries)[..., None]
    statistics = jnp.where(used, lse, jnp.inf), jnp.where(used, delta, 0)
    return jnp.stack([array.reshape(-1, TILE_ROWS) for array in statistics], axis=1)


def _used(queries: Int[Array, "tiles R"]) -> Bool[Array, "tiles R"]:
    """Whether somebody is at a place: a list ascends, and does not where it has ended."""
    return jnp.pad(queries[:, 1:] > queries[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _groups_of_tiles(chunk: Chunk, num_tiles: int, sizes: Sizes) -> Int[Array, "tiles"]:
    """The group of each tile that a slice has."""
    slices, groups = chunk.index.slices, sizes.groups
    row = slices[:, KEY_BLOCK] // sizes.num_blocks * groups + slices[:, GROUP] - chunk.first_group
    in_use = jnp.arange(len(slices), dtype=jnp.int32) < chunk.index.num_slices
    tiles = jnp.where(in_use, slices[:, NUM_TILES], 0)
    # Where each row's tiles end, by comparing with all slices: there are few rows.
    rows = jnp.arange(sizes.batch * groups, dtype=jnp.int32)[:, None]
    ends = jnp.where(row <= rows, tiles, 0).sum(1, dtype=jnp.int32)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)[:, None]
    # Tiles that no slice has come behind all rows.
    found = jnp.minimum((tile >= ends).sum(1, dtype=jnp.int32), sizes.batch * groups - 1)
    return chunk.first_group + found % groups
