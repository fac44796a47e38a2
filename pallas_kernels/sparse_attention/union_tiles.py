"""Union tiles: which key blocks a run of neighbouring queries needs, and which query each one.

Neighbouring queries of a trained model select nearly the same blocks. A tile of R queries that
loads the union of their blocks once, and masks per query, reads far fewer bytes than R lists would.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Query bits of one int32 word, the sign bit left out.
MAX_QUERIES = 31
# Words per row of a list: the kernel fetches it in copies of 128 bytes.
LIST_ALIGNMENT = 32

_QUERY_BITS = 5
_NOTHING = jnp.iinfo(jnp.int32).max


class UnionTiles(NamedTuple):
    """The distinct blocks of every tile of R neighbouring queries.

    Attributes:
      lists: per tile two rows: ids of its distinct blocks, ascending, and for each the set of
        queries that selected it, bit r for the tile's r-th query; zeros after `counts` entries.
      counts: distinct blocks per tile.
    """

    lists: Int[Array, "B Hkv tiles 2 L"]
    counts: Int[Array, "B Hkv tiles"]


def union_tiles(block_ids: Int[Array, "B Hkv T K"], queries: int, num_blocks: int) -> UnionTiles:
    """Sorts each tile's ids and merges equal neighbours: two sorts of R * K words, no gather.

    Args:
      block_ids: a block at most once per query; -1, anywhere, is no block.
      queries: R, queries per tile, at most MAX_QUERIES. The last tile may hold fewer.
      num_blocks: number of key blocks; bounds the length L of a list together with R * K.
    """
    keys = _sorted_keys(block_ids, queries)
    ids = keys >> _QUERY_BITS
    members = jnp.where(keys == _NOTHING, 0, 1 << (keys & (2**_QUERY_BITS - 1)))
    reach = 1
    # A block's entries lie side by side, at most one per query: doubling gathers all their bits.
    while reach < queries:
        members |= jnp.where(_later(ids, reach) == ids, _later(members, reach), 0)
        reach *= 2
    first = _first_of_each(ids) & (keys != _NOTHING)
    counts = first.sum(-1, dtype=jnp.int32)
    ids, members = jax.lax.sort(
        (jnp.where(first, ids, _NOTHING), jnp.where(first, members, 0)), num_keys=1, is_stable=False
    )
    lists = jnp.stack((jnp.where(members == 0, 0, ids), members), -2)
    return UnionTiles(
        _of_length(lists, list_length(queries, block_ids.shape[-1], num_blocks)), counts
    )


def list_length(queries: int, top_k: int, num_blocks: int) -> int:
    """L: the most blocks that a tile can need, in whole copies."""
    return -(-min(queries * top_k, num_blocks) // LIST_ALIGNMENT) * LIST_ALIGNMENT


def mean_union(block_ids: Int[Array, "B Hkv T K"], queries: int) -> Float[Array, ""]:
    """Mean number of distinct blocks over the whole tiles of `queries` neighbouring queries.

    What union tiles load grows with it: K when neighbours agree, up to queries * K when they share
    nothing.
    """
    whole = block_ids.shape[2] // queries * queries
    keys = _sorted_keys(block_ids[:, :, :whole], queries)
    distinct = _first_of_each(keys >> _QUERY_BITS) & (keys != _NOTHING)
    return distinct.sum(-1, dtype=jnp.float32).mean()


def _sorted_keys(block_ids: Int[Array, "B Hkv T K"], queries: int) -> Int[Array, "B Hkv tiles RK"]:
    """Every tile's (id, query) pairs as one word each, ascending, `_NOTHING` for no block."""
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"queries={queries} must be 1 to {MAX_QUERIES}, one bit each in a word")
    batch, groups, num_queries, top_k = block_ids.shape
    tiles = -(-num_queries // queries)
    pad = ((0, 0), (0, 0), (0, tiles * queries - num_queries), (0, 0))
    ids = jnp.pad(block_ids, pad, constant_values=-1)
    ids = ids.reshape(batch, groups, tiles, queries, top_k)
    keys = (ids << _QUERY_BITS) | jnp.arange(queries, dtype=jnp.int32)[:, None]
    keys = jnp.where(ids < 0, _NOTHING, keys).reshape(batch, groups, tiles, queries * top_k)
    return jax.lax.sort(keys, is_stable=False)


def _later(x: Array, distance: int) -> Array:
    """x[..., i + distance], -1 past the end."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, distance)]
    return jnp.pad(x, pad, constant_values=-1)[..., distance:]


def _first_of_each(ids: Array) -> Array:
    """True where a run of equal ids begins."""
    before = jnp.pad(ids[..., :-1], [(0, 0)] * (ids.ndim - 1) + [(1, 0)], constant_values=-1)
    return ids != before


def _of_length(lists: Array, length: int) -> Array:
    lists = lists[..., :length]
    return jnp.pad(lists, [(0, 0)] * (lists.ndim - 1) + [(0, length - lists.shape[-1])])
