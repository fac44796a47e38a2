"""How a persistent thread block of a KV-outer kernel goes over its slices of the reverse index."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.reverse_index import (
    FIRST_TILE,
    GROUP,
    KEY_BLOCK,
    NUM_TILES,
    OWN_QUERY,
    SLOT,
)

_FIELDS = GROUP, KEY_BLOCK, FIRST_TILE, NUM_TILES, OWN_QUERY, SLOT


class Slice(NamedTuple):
    """Those columns of a row of `ReverseIndex.slices`, as scalars."""

    group: jax.Array
    key_block: jax.Array
    first_tile: jax.Array
    num_tiles: jax.Array
    own_query: jax.Array
    slot: jax.Array


def for_each_slice(slices: Any, num_slices: Any, num_thread_blocks: int, visit):
    """visit(n, slice, tiles before it) for the thread block's slices, in order.

    Args:
      slices: reference to `ReverseIndex.slices`.
      num_slices: reference to `ReverseIndex.num_slices`.
      num_thread_blocks: of the grid's axis "thread_block"; they take slices in turn.
      visit: called with the number of the thread block's slice, a `Slice`, and how many tiles its
        slices before had.

    Returns:
      How many slices and how many tiles there were.
    """
    first = lax.axis_index("thread_block")
    count = lax.div(num_slices[0] - first + (num_thread_blocks - 1), num_thread_blocks)

    def read(n):
        item = jnp.minimum(first + n * num_thread_blocks, slices.shape[0] - 1)
        return Slice(*(slices[item, field] for field in _FIELDS))

    def step(n, carry):
        current, num_tiles = carry
        # Read one ahead: the latency of these scalars hides behind a slice's work.
        upcoming = read(n + 1)
        visit(n, current, num_tiles)
        return upcoming, num_tiles + current.num_tiles

    _, num_tiles = lax.fori_loop(0, count, step, (read(0), jnp.int32(0)))
    return count, num_tiles
