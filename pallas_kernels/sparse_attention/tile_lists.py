"""What a kernel on a TPU reads about a tile of neighbouring queries: which key blocks it needs.

A tile is R queries of one KV group with all heads of the group; it goes through the distinct blocks
of its queries, a few at a time.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.sparse_attention.union_tiles import union_tiles

# Rows of a tile's list. The last one holds scalars: at COUNT the number of blocks, at SLOT the key
# slot of the tile's first query.
PAGE, BLOCK, MEMBERS, SCALARS = range(4)
NUM_ROWS = 4
COUNT, SLOT = range(2)


def tile_lists(
    block_ids: Int[Array, "B Hkv T K"],
    query_offset: Int[Array, "B"],
    *,
    queries: int,
    num_tiles: int,
    num_blocks: int,
    page_table: Int[Array, "B N"] | None = None,
) -> Int[Array, "tiles 4 L"]:
    """The lists of all tiles, batch row by batch row and group by group.

    Args:
      block_ids: distinct and visible ones per query, -1 anywhere for none.
      query_offset: the key slot of the first query.
      queries: R, queries per tile.
      num_tiles: per batch row and group; those behind the last query are empty.
      num_blocks: N, per batch row.
      page_table: page of every block, of `Hkv` heads one after the other; None if blocks follow one
        another by batch row, then group.

    Returns:
      Per tile and distinct block: PAGE, where its keys are, in blocks of one head; BLOCK, its
      number; MEMBERS, bit r for the tile's r-th query. Nothing is a member of what follows.
    """
    batch, groups = block_ids.shape[:2]
    tiles = union_tiles(block_ids, queries, num_blocks)
    ids, members = tiles.lists[..., 0, :], tiles.lists[..., 1, :]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None, None]
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    if page_table is None:
        pages = (rows * groups + group) * num_blocks + ids
    else:
        pages = page_table[rows, ids] * groups + group
    first = jnp.arange(ids.shape[2], dtype=jnp.int32) * queries
    slots = jnp.broadcast_to(query_offset[:, None, None] + first, tiles.counts.shape)
    scalars = jnp.stack((tiles.counts, slots), -1)
    scalars = jnp.pad(scalars, [(0, 0)] * 3 + [(0, ids.shape[-1] - 2)])
    lists = jnp.stack((pages, ids, members, scalars), -2)
    missing = num_tiles - ids.shape[2]
    lists = jnp.pad(lists, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
    return lists.reshape(-1, NUM_ROWS, lists.shape[-1])
