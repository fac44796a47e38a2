"""Reverse index of a selection: for every key block, the queries that picked it.

The KV-outer kernels go over key blocks and gather the queries of each. Queries are taken in *rows*:
`queries_per_row` neighbouring queries of one batch row and KV group, so that what runs at a time
reads few of them and finds them in the L2 cache. A *list* is what a block has in a row, ascending
queries, padded to whole *tiles* of `queries_per_tile`; each entry of a tile is a *place*. Lists are
cut into *slices*, the work items of the kernel, of at most `tiles_per_slice` tiles.

Built by XLA from one sort of 32-bit integers, without atomics: the same in every run.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt

# Columns of `ReverseIndex.slices`. Eight, of which seven are used: one 32-byte sector per slice.
GROUP, KEY_BLOCK, FIRST_TILE, NUM_TILES, OWN_QUERY, SLOT, NUM_PARTS = range(7)
NUM_FIELDS = 8

# Those that are of a list: `ReverseLists.columns`.
_COLUMNS = GROUP, KEY_BLOCK, OWN_QUERY

# Sort keys are 32-bit; that of nobody comes last.
_NUM_KEYS = 2**32
_INVALID = np.uint32(_NUM_KEYS - 1)


class ReverseIndex(NamedTuple):
    """Who picked which block, for P places in M tiles of R queries.

    Attributes:
      queries: [P] row of each place's query in the flattened queries; row 0 where nobody is.
      places: the place of each (query, slot) of the selection, -1 where its id is -1.
      slices: [items, NUM_FIELDS], by the columns above: the group, the block's number in the
        flattened keys, the slice's first tile and number of tiles, and the row that the query in
        the block's first slot would have. Then for lists that were cut into several slices: the
        slice's number among all such slices (-1 if its list has no other), and in a list's first
        slice how many there are (else 0). Sorted by row, then block, unless dealt out.
      num_slices: [1], how many of `slices` are in use.
    """

    queries: Int[Array, "*chunks P"]
    places: Int[Array, "*chunks B Hkv T K"]
    slices: Int[Array, "*chunks items fields"]
    num_slices: Int[Array, "*chunks 1"]


class ReverseLists(NamedTuple):
    """Reverse indexes of C chunks of queries that are not cut into slices yet.

    What passes of different kernels share: the sort is behind it, and slices cost little.

    Attributes:
      queries: as in `ReverseIndex`.
      places: as in `ReverseIndex`, within the chunk.
      tiles: of each list.
      first_tiles: of each list, within the chunk.
      columns: [C, lists, 3], GROUP, KEY_BLOCK and OWN_QUERY of each list.
    """

    queries: Int[Array, "C P"]
    places: Int[Array, "C B Hkv T K"]
    tiles: Int[Array, "C lists"]
    first_tiles: Int[Array, "C lists"]
    columns: Int[Array, "C lists 3"]


def row_length(num_queries: int, num_blocks: int, top_k: int) -> int:
    """Queries per row: a power of two, of which a block's list has about 64 on average.

    At most 4096 (or four times the blocks), so that a row's queries stay in the L2 cache, and so
    few that block, query and slot fit into 32 bits.
    """
    wanted = max(4096, 4 << _bits(num_blocks))
    longest = max_row_length(num_blocks, top_k)
    return min(wanted, longest, max(64, 1 << _bits(num_queries)))


def max_row_length(num_blocks: int, top_k: int) -> int:
    """The most queries per row: a power of two, so that block, query and slot fit into 32 bits."""
    return 1 << (32 - _bits(num_blocks) - _bits(top_k))


def reverse_index(
    block_ids: Int[Array, "B Hkv T K"],
    first_query: Int[Array, "B"],
    first_slot: Int[Array, "B"],
    *,
    queries_per_tile: int,
    tiles_per_slice: int,
    **sizes: int,
) -> ReverseIndex:
    """The reverse index of a single chunk; see `reverse_lists` and `slices_of`."""
    first_group = jnp.zeros(1, jnp.int32)
    place = first_query[None], first_slot[None], first_group
    tile = {"queries_per_tile": queries_per_tile}
    lists = reverse_lists(block_ids[None], *place, **sizes, **tile)
    index = slices_of(lists, tiles_per_slice=tiles_per_slice, **tile)
    return jax.tree.map(lambda array: array[0], index)


def reverse_lists(
    block_ids: Int[Array, "C B Hkv T K"],
    first_query: Int[Array, "C B"],
    first_slot: Int[Array, "C B"],
    first_group: Int[Array, "C"],
    *,
    num_blocks: int,
    block_size: int,
    queries_per_row: int,
    queries_per_tile: int,
) -> ReverseLists:
    """Builds the lists of visible, distinct block ids, of all chunks at once.

    Args:
      block_ids: -1 for nobody, at any slot; T is a multiple of `queries_per_row`.
      first_query: row of the first query in the flattened queries, per chunk and batch row.
      first_slot: the key slot that this query sits in.
      first_group: of each chunk.
      num_blocks: per batch row; ids are below.
      block_size: slots per block.
      queries_per_row: see `row_length`; a power of two and a multiple of `queries_per_tile`.
      queries_per_tile: queries whose heads fill a tile of the kernel.
    """
    chunks, batch, groups, num_queries, top_k = block_ids.shape
    rows_per_group = num_queries // queries_per_row
    in_chunk = _Lists(batch * groups * rows_per_group, num_blocks, queries_per_row, top_k)
    lists = in_chunk._replace(num_rows=chunks * in_chunk.num_rows)
    keys, valid = _sorted_keys(block_ids.reshape(lists.num_rows, -1), lists)
    starts, counts = _boundaries(keys, valid, lists)
    tiles = -(-counts // queries_per_tile).reshape(chunks, -1)
    first_tiles = jnp.cumsum(tiles, axis=1) - tiles
    # A row is of one chunk, batch row and group, so that its number says all three.
    row = jnp.arange(lists.num_rows, dtype=jnp.int32)
    group = row // rows_per_group % groups + first_group[row // in_chunk.num_rows]
    chunk_and_batch_row = row // (groups * rows_per_group)
    row_query = first_query.reshape(-1)[chunk_and_batch_row]
    row_query += row % rows_per_group * queries_per_row

    pairs, entries, used = _entries(keys, valid, lists)
    place = (first_tiles.reshape(-1) * queries_per_tile - starts)[pairs] + jnp.arange(len(pairs))
    num_places = in_chunk.max_parts(in_chunk.num_entries, queries_per_tile) * queries_per_tile
    query = entries // lists.slots % queries_per_row + row_query[pairs // num_blocks]
    at = pairs // in_chunk.num_lists * num_places + place
    queries = _scatter(jnp.zeros(chunks * num_places, jnp.int32), at, query, used)
    original = entries // lists.slots * top_k + entries % lists.slots
    places = _scatter(jnp.full(lists.num_entries, -1, jnp.int32), original, place, used)

    block = jnp.arange(num_blocks, dtype=jnp.int32)
    shift = (first_query - first_slot).reshape(-1)[chunk_and_batch_row]
    columns = {
        GROUP: jnp.broadcast_to(group[:, None], (lists.num_rows, num_blocks)),
        KEY_BLOCK: (chunk_and_batch_row % batch * num_blocks)[:, None] + block,
        OWN_QUERY: shift[:, None] + block * block_size,
    }
    return ReverseLists(
        queries.reshape(chunks, num_places),
        places.reshape(block_ids.shape),
        tiles,
        first_tiles,
        jnp.stack([columns[name] for name in _COLUMNS], axis=-1).reshape(chunks, -1, 3),
    )


def slices_of(
    lists: ReverseLists, *, queries_per_tile: int, tiles_per_slice: int, thread_blocks: int = 1
) -> ReverseIndex:
    """The reverse index of each chunk, its lists cut into slices of at most so many tiles.

    Of several thread blocks, which take slices in turn, each gets about as many tiles.
    """
    most = min(lists.tiles.shape[1], math.prod(lists.places.shape[1:]))  # lists that are not empty
    max_tiles = lists.queries.shape[1] // queries_per_tile
    max_slices = (max_tiles + most * (tiles_per_slice - 1)) // tiles_per_slice
    cut = functools.partial(_slices, tiles_per_slice=tiles_per_slice, max_slices=max_slices)
    slices, num_slices = jax.vmap(cut)(lists.columns, lists.tiles, lists.first_tiles)
    if thread_blocks > 1:
        slices = jax.vmap(functools.partial(_dealt, thread_blocks))(slices, num_slices)
    return ReverseIndex(lists.queries, lists.places, slices, num_slices)


def _dealt(
    thread_blocks: int, slices: Int[Array, "items fields"], num_slices: Int[Array, "1"]
) -> Int[Array, "items fields"]:
    """The slices in an order that gives thread blocks, taking them in turn, about as many tiles.

    Long ones first, and to and fro, as teams are chosen; but the slices of a group stay together,
    for they share queries.
    """
    item = jnp.arange(len(slices), dtype=jnp.int32)
    group = jnp.where(item < num_slices, slices[:, GROUP], jnp.iinfo(jnp.int32).max)
    *_, order = jax.lax.sort((group, -slices[:, NUM_TILES], item), num_keys=3)
    turn, seat = item // thread_blocks, item % thread_blocks
    # The last turn may not be everybody's.
    back = (turn % 2 == 1) & ((turn + 1) * thread_blocks <= num_slices)
    return slices[order[jnp.where(back, (turn + 1) * thread_blocks - 1 - seat, item)]]


def max_split_slices(num_tiles: int, tiles_per_slice: int) -> int:
    """The most slices that lists of more than one slice can have, at least 1."""
    return max(1, 2 * num_tiles // (tiles_per_slice + 1))


class _Lists(NamedTuple):
    """Sizes: rows of queries, blocks per row, queries and slots per row."""

    num_rows: int
    num_blocks: int
    queries_per_row: int
    top_k: int

    @property
    def slots(self) -> int:
        """Slots per query in a key: a power of two."""
        return 1 << _bits(self.top_k)

    @property
    def num_lists(self) -> int:
        return self.num_rows * self.num_blocks

    @property
    def num_entries(self) -> int:
        return self.num_rows * self.queries_per_row * self.top_k

    @property
    def rows_per_sort(self) -> int:
        """A divisor of the rows: as many as one 32-bit key can tell apart."""
        fit = _NUM_KEYS // (self.num_blocks * self.queries_per_row * self.slots)
        if fit < 1:
            raise ValueError(
                f"queries_per_row={self.queries_per_row} with {self.num_blocks} blocks and "
                f"top_k={self.top_k} needs more than 32 bits per key; take row_length(...)"
            )
        return max(n for n in range(1, min(fit, self.num_rows) + 1) if self.num_rows % n == 0)

    def max_parts(self, total: int, size: int) -> int:
        """Parts of at most `size`, whatever way `total` is spread over the lists."""
        return (total + min(self.num_lists, self.num_entries) * (size - 1)) // size


def _bits(count: int) -> int:
    """Bits that tell `count` values apart."""
    return (count - 1).bit_length()


def _sorted_keys(
    block_ids: Int[Array, "rows entries"], lists: _Lists
) -> tuple[UInt[Array, "sorts keys"], Int[Array, "sorts"]]:
    """Keys (row, block, query, slot) of each sort's rows, ascending, and how many are valid.

    The key of an id of -1 is the largest one. A valid entry may have it too, at the end of the
    valid ones: its place is right all the same.
    """
    rows = jnp.arange(lists.num_rows, dtype=jnp.uint32)[:, None] % lists.rows_per_sort
    within = jnp.arange(lists.queries_per_row * lists.top_k, dtype=jnp.uint32)
    low = within // lists.top_k * lists.slots + within % lists.top_k
    high = rows * lists.num_blocks + block_ids.astype(jnp.uint32)
    keys = high * (lists.queries_per_row * lists.slots) + low
    keys = jnp.where(block_ids >= 0, keys, _INVALID).reshape(-1, lists.rows_per_sort * len(within))
    valid = (block_ids >= 0).reshape(keys.shape).sum(1, dtype=jnp.int32)
    # One flat sort each: of a batch, the radix sort would give each row to a single core.
    return jnp.stack([jnp.sort(part) for part in keys]), valid


def _boundaries(
    keys: UInt[Array, "sorts keys"], valid: Int[Array, "sorts"], lists: _Lists
) -> tuple[Int[Array, "lists"], Int[Array, "lists"]]:
    """Where each list starts among all sorted keys, and how long it is."""
    firsts = jnp.arange(lists.rows_per_sort * lists.num_blocks, dtype=jnp.uint32) * (
        lists.queries_per_row * lists.slots
    )
    # Unrolled it is one fused kernel, not a loop of some twenty.
    starts = jnp.stack(
        [jnp.searchsorted(part, firsts, method="scan_unrolled").astype(jnp.int32) for part in keys]
    )
    ends = jnp.concatenate([starts[:, 1:], valid[:, None]], axis=1)
    base = jnp.arange(len(keys), dtype=jnp.int32)[:, None] * keys.shape[1]
    return (starts + base).reshape(-1), (ends - starts).reshape(-1)


def _entries(
    keys: UInt[Array, "sorts keys"], valid: Int[Array, "sorts"], lists: _Lists
) -> tuple[Int[Array, "N"], Int[Array, "N"], Bool[Array, "N"]]:
    """Each sorted key's list, its (row, query, slot) as one number, and whether it is valid."""
    used = jnp.arange(keys.shape[1], dtype=jnp.int32) < valid[:, None]
    first_row = jnp.arange(len(keys), dtype=jnp.int32)[:, None] * lists.rows_per_sort
    per_list = lists.queries_per_row * lists.slots
    pairs = (keys // per_list).astype(jnp.int32) + first_row * lists.num_blocks
    pairs = jnp.where(used, pairs, 0)
    entries = (keys % per_list).astype(jnp.int32) + pairs // lists.num_blocks * per_list
    return pairs.reshape(-1), entries.reshape(-1), used.reshape(-1)


def _scatter(
    into: Int[Array, "n"], at: Int[Array, "m"], values: Int[Array, "m"], used: Bool[Array, "m"]
) -> Int[Array, "n"]:
    """Writes `values` to distinct places; those unused go nowhere, each to a place of its own."""
    nowhere = len(into) + jnp.arange(len(at), dtype=jnp.int32)
    at = jnp.where(used, at, nowhere)
    return into.at[at].set(values, mode="drop", unique_indices=True)


def _slices(
    columns: Int[Array, "lists 3"],
    tiles: Int[Array, "lists"],
    first_tiles: Int[Array, "lists"],
    *,
    tiles_per_slice: int,
    max_slices: int,
) -> tuple[Int[Array, "items fields"], Int[Array, "1"]]:
    """Cuts lists into slices of about equal length: the table, and how many there are."""
    parts = -(-tiles // tiles_per_slice)
    ends = jnp.cumsum(parts)
    starts = ends - parts
    numbers = jnp.arange(len(tiles), dtype=jnp.int32)
    marks = _scatter(jnp.zeros(max_slices, jnp.int32), starts, numbers, parts > 0)
    owner = jax.lax.cummax(marks)
    item = jnp.arange(max_slices, dtype=jnp.int32)
    nth = item - starts[owner]
    total, count = tiles[owner], jnp.maximum(parts[owner], 1)
    first, stop = total * nth // count, total * (nth + 1) // count
    split = jnp.where(parts > 1, parts, 0)
    slot = (jnp.cumsum(split) - split)[owner] + nth
    fields = dict(zip(_COLUMNS, columns[owner].T, strict=True))
    fields |= {FIRST_TILE: first_tiles[owner] + first, NUM_TILES: stop - first}
    fields[SLOT] = jnp.where(split[owner] > 0, slot, -1)
    fields[NUM_PARTS] = jnp.where(nth == 0, split[owner], 0)
    unused = jnp.zeros(max_slices, jnp.int32)
    table = jnp.stack([fields.get(i, unused) for i in range(NUM_FIELDS)], axis=1)
    return table, ends[-1:]
