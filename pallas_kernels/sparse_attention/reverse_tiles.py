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
    queries: int,
    tiles_per_group: int,
    tiles_per_row: int,
    num_blocks: int,
    block_size: int,
    tiles_per_slice: int,
    cores: int,
) -> ReverseTiles:
    """Sorts what tiles need by block.

    Args:
      lists: of `tile_lists`; BLOCK and MEMBERS are read, and SLOT of each row's first tile.
      queries: R, queries per tile.
      tiles_per_group: tiles of a batch row and group.
      tiles_per_row: tiles that share blocks: those of a batch row and group; or of a batch row, if
        all groups have the same keys.
      num_blocks: N, per such row.
      block_size: key slots per block.
      tiles_per_slice: at most.
      cores: that owners are dealt to; at most as many as owners.
    """
    num_owners = lists.shape[0] // tiles_per_row * num_blocks
    per_core = -(-num_owners // cores)
    places, tiles, members = _sorted_entries(lists, tiles_per_row, num_blocks, cores)
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
    owners = _owner(at, per_core, cores)
    row, block = owners // num_blocks, owners % num_blocks
    tiles, members = (_cut(x, start, count, tiles_per_slice) for x in (tiles, members))
    first_slot = lists[::tiles_per_row, SCALARS, SLOT][row] - block * block_size
    distance = first_slot[:, None] + tiles % tiles_per_group * queries
    pages = row[:, None] * tiles_per_row + tiles
    scalars = jnp.pad(count[:, None], ((0, 0), (0, tiles_per_slice - 1)))
    # PAGE, DISTANCE, MEMBERS, SCALARS.
    slices = jnp.stack((pages, distance, members, scalars), axis=1)
    return ReverseTiles(slices, owners, first[::per_core])


def _sorted_entries(
    lists: Int[Array, "tiles 4 L"], tiles_per_row: int, num_blocks: int, cores: int
) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, "n"]]:
    """By ascending place of its owner every (tile, block): the place, the tile and the members.

    Places number the owners core by core, tiles count from the first one of their row.
    """
    num_tiles, _, length = lists.shape
    num_owners = num_tiles // tiles_per_row * num_blocks
    per_core = -(-num_owners // cores)
    tile = jax.lax.broadcasted_iota(jnp.int32, (num_tiles, length), 0)
    row, tile = tile // tiles_per_row, tile % tiles_per_row
    owner = row * num_blocks + lists[:, BLOCK]
    nobody = cores * per_core
    place = owner % cores * per_core + owner // cores
    place = jnp.where(lists[:, MEMBERS] != 0, place, nobody)
    place, tile, members = (x.reshape(-1) for x in (place, tile, lists[:, MEMBERS]))
    # A tile needs a block once: the order is whole.
    if (nobody + 1) * tiles_per_row > 2**32:
        place, tile, members = jax.lax.sort((place, tile, members), num_keys=2, is_stable=False)
        return place, tile, members
    # Half the operands to move and to compare, where both numbers fit into one.
    keys = place.astype(jnp.uint32) * tiles_per_row + tile.astype(jnp.uint32)
    keys, members = jax.lax.sort((keys, members), num_keys=1, is_stable=False)
    place, tile = keys // tiles_per_row, keys % tiles_per_row
    return place.astype(jnp.int32), tile.astype(jnp.int32), members


def _owner(place: Int[Array, "n"], per_core: int, cores: int) -> Int[Array, "n"]:
    return place % per_core * cores + place // per_core


def _cut(
    entries: Int[Array, "n"], start: Int[Array, "items"], count: Int[Array, "items"], length: int
) -> Int[Array, "items L"]:
    """Runs of entries, with 0 behind them.

    A run lies in two neighbouring windows, which are gathered whole and moved to its start, one bit
    of the distance at a time: XLA would take runs that start anywhere out one by one.
    """
    windows = jnp.pad(entries, (0, -len(entries) % length + 2 * length)).reshape(-1, length)
    window, distance = start // length, start % length
    cut = jnp.concatenate((windows[window], windows[window + 1]), axis=1)
    step = 1
    while step < length:
        moved = jnp.concatenate((cut[:, step:], cut[:, :step]), axis=1)
        cut = jnp.where((distance & step != 0)[:, None], moved, cut)
        step *= 2
    return jnp.where(jnp.arange(length, dtype=jnp.int32) < count[:, None], cut[:, :length], 0)
