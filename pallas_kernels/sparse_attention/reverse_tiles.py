"""For every key block the tiles of neighbouring queries that need it, cut into slices.

What a TPU kernel that sums over the queries of a key block goes through: its *owner* is the block,
and a slice of the owner's tiles is laid out as a tile's list of blocks is (see `tile_lists`), so
that the same ring of copies fetches tiles in place of blocks. Built by XLA from one sort: the same
in every run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.sparse_attention.tile_lists import BLOCK, MEMBERS, SCALARS, SLOT

# What a slice has in the row where a tile has BLOCK: the slot of the tile's first query, counted
# from the block's first key.
DISTANCE = BLOCK


class ReverseTiles(NamedTuple):
    """Slices of at most L tiles, those of a core one after the other, by ascending owner.

    Attributes:
      lists: of each slice the rows PAGE, the number of a tile (ascending); DISTANCE; MEMBERS, bit r
        if the tile's r-th query picked the block; and SCALARS, with the number of tiles at COUNT.
        Nothing is a member of what follows.
      owners: the block of each slice, counted over all rows. Every block has a slice, if an empty
        one. Behind the last slice: the last owner, no tiles.
      first_slices: of each core, then the number of slices. Core c has owners c, c + cores, ...
    """

    lists: Int[Array, "slices 4 L"]
    owners: Int[Array, "slices"]
    first_slices: Int[Array, "edges"]


def reverse_tiles(
    lists: Int[Array, "tiles 4 L"],
    *,
    tiles_per_row: int,
    num_blocks: int,
    block_size: int,
    tiles_per_slice: int,
    cores: int,
) -> ReverseTiles:
    """Sorts what tiles need by block.

    Args:
      lists: of `tile_lists`; only BLOCK, MEMBERS and SLOT are read.
      tiles_per_row: tiles that share blocks: those of a batch row and group; or of a batch row, if
        all groups have the same keys.
      num_blocks: N, per such row.
      block_size: key slots per block.
      tiles_per_slice: at most.
      cores: that owners are dealt to; at most as many as owners.
    """
    num_owners = lists.shape[0] // tiles_per_row * num_blocks
    per_core = -(-num_owners // cores)
    places, entries = _sorted_entries(lists, tiles_per_row, num_blocks, block_size, cores)
    place = jnp.arange(cores * per_core, dtype=jnp.int32)
    edges = jnp.arange(cores * per_core + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(places, edges, method="scan_unrolled").astype(jnp.int32)
    # Nobody's sums are zeros that a slice has to write, too.
    parts = jnp.maximum(-(-(starts[1:] - starts[:-1]) // tiles_per_slice), 1)
    parts = jnp.where(_owner(place, per_core, cores) < num_owners, parts, 0)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(parts, dtype=jnp.int32)])

    # Whatever way the tiles are spread, there are no more slices than that.
    item = jnp.arange(places.size // tiles_per_slice + num_owners, dtype=jnp.int32)
    item = jnp.minimum(item, first[-1])
    at = jnp.searchsorted(first, item, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    # The place of the last slice, which need not be the last place.
    at = jnp.where(item < first[-1], at, place[-1] - (place.size > num_owners))
    start = starts[at] + (item - first[at]) * tiles_per_slice
    count = jnp.where(item < first[-1], jnp.clip(starts[at + 1] - start, 0, tiles_per_slice), 0)
    slices = _cut(entries, start, count, tiles_per_slice)
    return ReverseTiles(slices, _owner(at, per_core, cores), first[::per_core])


def _sorted_entries(
    lists: Int[Array, "tiles 4 L"],
    tiles_per_row: int,
    num_blocks: int,
    block_size: int,
    cores: int,
) -> tuple[Int[Array, "n"], Int[Array, "3 n"]]:
    """The place of every (tile, block)'s owner, ascending, and its PAGE, DISTANCE and MEMBERS.

    Places number the owners core by core.
    """
    num_tiles, _, length = lists.shape
    num_owners = num_tiles // tiles_per_row * num_blocks
    per_core = -(-num_owners // cores)
    tile = jax.lax.broadcasted_iota(jnp.int32, (num_tiles, length), 0)
    blocks, members = lists[:, BLOCK], lists[:, MEMBERS]
    owner = tile // tiles_per_row * num_blocks + blocks
    place = owner % cores * per_core + owner // cores
    place = jnp.where(members != 0, place, cores * per_core)
    distance = lists[:, SCALARS, SLOT, None] - blocks * block_size
    # A tile needs a block once: the order is whole.
    operands = (place, tile, distance, members)
    place, *entries = jax.lax.sort([x.reshape(-1) for x in operands], num_keys=2, is_stable=False)
    return place, jnp.stack(entries)


def _owner(place: Int[Array, "n"], per_core: int, cores: int) -> Int[Array, "n"]:
    return place % per_core * cores + place // per_core


def _cut(
    entries: Int[Array, "3 n"], start: Int[Array, "items"], count: Int[Array, "items"], length: int
) -> Int[Array, "items 4 L"]:
    """The lists of slices from runs of entries."""
    entries = jnp.pad(entries, ((0, 0), (0, length)))
    cut = jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(entries, first, length, 1))(start)
    within = jnp.arange(length, dtype=jnp.int32) < count[:, None]
    cut = jnp.where(within[:, None], cut, 0)
    scalars = jnp.pad(count[:, None, None], ((0, 0), (0, 0), (0, length - 1)))
    # PAGE, DISTANCE, MEMBERS, then SCALARS.
    return jnp.concatenate((cut, scalars), axis=1)
