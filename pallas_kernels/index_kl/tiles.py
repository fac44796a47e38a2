"""The work of the KL kernels: tiles of 64 queries of one group against one key block.

A tile's queries are those of a *row tile*, 64 *rows* that most arrays are stored by: with a
selection the queries that picked the block, without one 64 neighbours, which serve all blocks
before them.
Built by XLA without atomics: the same in every run.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.reverse_index import (
    FIRST_TILE,
    GROUP,
    KEY_BLOCK,
    NUM_FIELDS,
    NUM_TILES,
    OWN_QUERY,
    reverse_index,
)

# Queries of a tile.
TILE_QUERIES = 64

# Columns of `Tiles.tiles`. With one tile per slice of the reverse index, a slice's first tile is
# its row tile, and the number of its tiles leaves room for that of its queries.
ROW_TILE, NUM_QUERIES = FIRST_TILE, NUM_TILES

# The query of a row where nobody is: so far before every block that it sees no key.
NOBODY = -(2**30)


class Tiles(NamedTuple):
    """Which queries meet which key block: M tiles over R row tiles.

    Attributes:
      queries: [R, 64] row in the flattened queries, NOBODY where there is none; those that are come
        first.
      groups: [R] of these queries.
      tiles: [M, NUM_FIELDS], by the columns above: the group, the block's number in the flattened
        keys, the row tile, how many queries it has, and the row that the query in the block's first
        slot would have.
      num_tiles: [1], how many of `tiles` are in use; they come first.
      places: [B, Hkv, T, K] where the results of each query's K blocks lie, as tile * 64 + row; -1
        where it has none.
    """

    queries: Int[Array, "R 64"]
    groups: Int[Array, "R"]
    tiles: Int[Array, "M fields"]
    num_tiles: Int[Array, "1"]
    places: Int[Array, "B Hkv T K"]


def selected_tiles(
    block_ids: Int[Array, "B Hkv T K"],
    first_query: Int[Array, "B"],
    first_slot: Int[Array, "B"],
    *,
    num_blocks: int,
    block_size: int,
    queries_per_row: int,
) -> Tiles:
    """Tiles of the queries that picked each block; arguments as of `reverse_index`."""
    index = reverse_index(
        block_ids,
        first_query,
        first_slot,
        num_blocks=num_blocks,
        block_size=block_size,
        queries_per_row=queries_per_row,
        queries_per_tile=TILE_QUERIES,
        tiles_per_slice=1,
    )
    queries = index.queries.reshape(-1, TILE_QUERIES)
    # Nobody's query is 0, and a list's queries ascend: only its first one may be query 0.
    somebody = (queries > 0).at[:, 0].set(True)
    tiles = index.slices.at[:, NUM_QUERIES].set(somebody.sum(1, dtype=jnp.int32))
    queries = jnp.where(somebody, queries, NOBODY)
    return Tiles(queries, tiles[:, GROUP], tiles, index.num_slices, index.places)


def dense_tiles(
    first_query: Int[Array, "B"],
    first_slot: Int[Array, "B"],
    num_left: Int[Array, ""],
    *,
    num_queries: int,
    groups: int,
    num_blocks: int,
    block_size: int,
) -> Tiles:
    """Tiles of every block before (or around) each 64 neighbouring queries.

    Args:
      first_query: row of the first query in the flattened queries, per batch row.
      first_slot: the key slot that this query sits in.
      num_left: how many queries there are from `first_query` on; those behind are nobody.
      num_queries: a multiple of 64.
      groups: KV groups.
      num_blocks: per batch row.
      block_size: slots per block.
    """
    batch, runs = len(first_query), num_queries // TILE_QUERIES
    shape = batch, groups, runs, num_blocks
    within = jnp.arange(num_queries, dtype=jnp.int32).reshape(runs, TILE_QUERIES)
    rows = jnp.where(within < num_left, first_query[:, None, None] + within, NOBODY)
    count = (within < num_left).sum(1, dtype=jnp.int32)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    batch_row = jnp.arange(batch, dtype=jnp.int32)
    last_slot = first_slot[:, None] + within[:, 0] + count - 1
    seen = (block <= (last_slot // block_size)[..., None]) & (count > 0)[:, None]
    seen = jnp.broadcast_to(seen[:, None], shape).reshape(-1)
    fields = {
        GROUP: jnp.arange(groups, dtype=jnp.int32)[:, None, None],
        KEY_BLOCK: (batch_row[:, None] * num_blocks + block)[:, None, None],
        ROW_TILE: jnp.arange(batch * groups * runs, dtype=jnp.int32).reshape(shape[:3])[..., None],
        NUM_QUERIES: count[:, None],
        OWN_QUERY: ((first_query - first_slot)[:, None] + block * block_size)[:, None, None],
    }
    unused = jnp.zeros((), jnp.int32)
    columns = [jnp.broadcast_to(fields.get(i, unused), shape) for i in range(NUM_FIELDS)]
    table = jnp.stack(columns, axis=-1).reshape(-1, NUM_FIELDS)
    # Those in use to the front, in order.
    tiles = table[jnp.argsort(~seen, stable=True)]
    number = jnp.where(seen, jnp.cumsum(seen, dtype=jnp.int32) - 1, -1).reshape(shape)
    row = jnp.arange(TILE_QUERIES, dtype=jnp.int32)[:, None]
    number = number[:, :, :, None]
    places = jnp.where(number >= 0, number * TILE_QUERIES + row, -1)
    return Tiles(
        jnp.broadcast_to(rows[:, None], (*shape[:3], TILE_QUERIES)).reshape(-1, TILE_QUERIES),
        jnp.broadcast_to(fields[GROUP][..., 0], shape[:3]).reshape(-1),
        tiles,
        seen.sum(dtype=jnp.int32).reshape(1),
        places.reshape(batch, groups, num_queries, num_blocks),
    )


def by_row(
    array: Float[Array, "queries Hkv *rest"], tiles: Tiles, nobody: float
) -> Float[Array, "R 64 *rest"]:
    """What each row's query and group have in `array`; `nobody` where there is no query."""
    rows = array.at[jnp.maximum(tiles.queries, 0), tiles.groups[:, None]].get(
        mode="promise_in_bounds"
    )
    somebody = (tiles.queries >= 0).reshape(*tiles.queries.shape, *(1,) * (array.ndim - 2))
    return jnp.where(somebody, rows, jnp.asarray(nobody, array.dtype))
