"""The KV-outer scheme: reverse index, attention per key block, exact combination, in chunks.

Its work is that of the selected blocks alone, however little neighbouring queries agree; its price
is that the K results of each query and head go through device memory once. Chunks of queries bound
the room that they take.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.chunks_mosaic_gpu import (
    Chunks,
    chunk_lists,
    for_each_chunk,
)
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig, combine
from pallas_kernels.sparse_attention.kv_outer_mosaic_gpu import (
    TILE_ROWS,
    AttentionConfig,
    default_config,
    partial_attention,
)
from pallas_kernels.sparse_attention.reverse_index import ReverseLists, row_length, slices_of


@dataclasses.dataclass(frozen=True)
class KVOuterConfig:
    """Shape of the scheme.

    Attributes:
      attention: the kernel per key block, by default as `default_config` says.
      combine: the kernel that merges its results.
      partial_bytes: of device memory that those results may take; by default those of 32768
        queries with 64 heads of 128 dims and 16 blocks.
      queries_per_row: see `reverse_index.row_length`, which chooses it by default.
    """

    attention: AttentionConfig | None = None
    combine: CombineConfig = dataclasses.field(default_factory=CombineConfig)
    partial_bytes: int = 2**33
    queries_per_row: int | None = None

    def __post_init__(self):
        if self.partial_bytes < 1:
            raise ValueError(f"partial_bytes={self.partial_bytes} must be positive")
        row = self.queries_per_row
        if row is not None and (row < TILE_ROWS or row & (row - 1)):
            raise ValueError(f"queries_per_row={row} must be a power of two from {TILE_ROWS} on")


def kv_outer(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    query_offset: Int[Array, "B"] | int,
    lists: ReverseLists | None = None,
    *,
    block_size: int,
    scale: float,
    config: KVOuterConfig,
    chunks: Chunks | None = None,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over visible, distinct selected blocks: output and natural log-sum-exp.

    Args:
      q: bfloat16 or float16 queries, at most 64 heads per group.
      k: keys.
      v: values.
      block_ids: each visible to its query, none twice, -1 for nobody.
      query_offset: the key slot of the first query.
      lists: what `chunk_lists` makes of block ids and offset; None to make it here.
      block_size: 64 or 128.
      scale: of the scores, positive.
      config: the scheme's shape.
      chunks: of `lists`; None for what the config says.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups, top_k = k.shape[2], block_ids.shape[3]
    q = padded_groups(q, groups)
    k, v = (whole_blocks(array, block_size) for array in (k, v))
    num_blocks = k.shape[1] // block_size
    per_group = q.shape[2] // groups
    attention = config.attention or default_config(per_group)
    tile = {"queries_per_tile": TILE_ROWS // per_group}
    if chunks is None or lists is None:
        chunks = _chunks(config, q, top_k, num_blocks)
        sizes = {"num_blocks": num_blocks, "block_size": block_size}
        lists = chunk_lists(block_ids, query_offset, chunks, **sizes, **tile)
    index = slices_of(
        lists,
        tiles_per_slice=attention.tiles_per_slice,
        thread_blocks=attention.num_thread_blocks,
        **tile,
    )
    flat_q, flat_k, flat_v = (array.reshape(-1, *array.shape[2:]) for array in (q, k, v))
    # Each chunk writes its part of the output: stacking them would copy all of it.
    length = chunks.number * chunks.length
    o = jax.empty_ref(jax.ShapeDtypeStruct((batch * length, *flat_q.shape[1:]), q.dtype))

    def attend(chunk):
        partial, partial_lse = partial_attention(
            flat_q,
            flat_k,
            flat_v,
            chunk.index,
            block_size=block_size,
            scale=scale,
            config=attention,
        )
        places, slot_lse = by_tiles(chunk.index.places, partial_lse)
        place = chunk.start, chunk.first_group
        lse = combine(partial, places, slot_lse, o, *place, config=config.combine)
        return lse.reshape(batch, groups // chunks.parts, chunks.length, per_group)

    lse = for_each_chunk(attend, chunks, groups, index)
    lse = lse.reshape(chunks.number, chunks.parts, *lse.shape[1:])
    lse = lse.transpose(2, 1, 3, 5, 0, 4).reshape(batch, groups, per_group, length)
    heads = num_heads // groups
    whole = jax.freeze(o).reshape(batch, length, groups, per_group, head_dim)
    whole = whole[:, :num_queries, :, :heads]
    lse = lse[:, :, :heads, :num_queries]
    return whole.reshape(batch, num_queries, num_heads, head_dim), lse.reshape(batch, num_heads, -1)


def _chunks(
    config: KVOuterConfig, q: Float[Array, "B T Hq D"], top_k: int, num_blocks: int
) -> Chunks:
    """All groups of as many queries as there is room for: whole rows, evenly spread."""
    batch, num_queries, num_heads, head_dim = q.shape
    row = config.queries_per_row or row_length(num_queries, num_blocks, top_k)
    bytes_per_query = batch * top_k * num_heads * head_dim * q.dtype.itemsize
    most = max(1, config.partial_bytes // bytes_per_query // row) * row
    number = -(-num_queries // most)
    return Chunks(number, -(-num_queries // (number * row)) * row, row, 1)


def by_tiles(
    places: Int[Array, "B Hkv T K"], partial_lse: Float[Array, "places G"]
) -> tuple[Int[Array, "B Hkv tiles K R"], Float[Array, "B Hkv tiles K R*G"]]:
    """Places (0 for nobody) and log-sum-exp (-inf for nobody) in the order of combined tiles.

    Args:
      places: of each query's slots, -1 for nobody.
      partial_lse: log-sum-exp by place; what no slot refers to may be anything.
    """
    batch, groups, num_queries, top_k = places.shape
    per_tile = TILE_ROWS // partial_lse.shape[1]
    tiles = places.reshape(batch, groups, num_queries // per_tile, per_tile, top_k).swapaxes(3, 4)
    at = jnp.maximum(tiles, 0)
    lse = partial_lse.at[at].get(mode="promise_in_bounds")
    lse = jnp.where((tiles >= 0)[..., None], lse, -jnp.inf)
    return at, lse.reshape(*tiles.shape[:4], TILE_ROWS)


def padded_groups(q: Float[Array, "B T Hq D"], groups: int) -> Float[Array, "B T Hp D"]:
    """Queries with 8, 16, 32 or 64 heads per group: as many of zeros as that takes."""
    batch, num_queries, num_heads, head_dim = q.shape
    per_group = num_heads // groups
    padded = max(8, 1 << (per_group - 1).bit_length())
    if padded == per_group:
        return q
    grouped = q.reshape(batch, num_queries, groups, per_group, head_dim)
    grouped = jnp.pad(grouped, [(0, 0)] * 3 + [(0, padded - per_group), (0, 0)])
    return grouped.reshape(batch, num_queries, groups * padded, head_dim)


def whole_blocks(
    array: Float[Array, "B S Hkv D"], block_size: int
) -> Float[Array, "B S_padded Hkv D"]:
    """Keys or values with zeros up to a whole number of blocks; causality hides them."""
    padding = -array.shape[1] % block_size
    return jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else array
