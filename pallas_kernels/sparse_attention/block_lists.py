"""For every key block the queries that picked it, cut into slices of bounded length.

What kernels that sum over the queries of a key block go through: a slice per program, and then the
slices of a block added up in order. Built by XLA from one sort, without atomics: the same in every
run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class BlockLists(NamedTuple):
    """Lists of queries by (batch row, group, block), numbered in that order.

    Attributes:
      queries: all lists one after the other, each ascending; what is behind them is of nobody.
      slices: of each slice its list, its first entry in `queries` and the end of its entries. A
        slice that is not used has no entries.
      first_slices: of each list its first slice, then the number of slices.
    """

    queries: Int[Array, "entries"]
    slices: Int[Array, "items 3"]
    first_slices: Int[Array, "lists"]


def block_lists(
    block_ids: Int[Array, "B Hkv T K"], num_blocks: int, queries_per_slice: int
) -> BlockLists:
    """Sorts the selection by block.

    Args:
      block_ids: distinct ones per query, -1 anywhere for none.
      num_blocks: N, per batch row.
      queries_per_slice: at most.
    """
    batch, groups, num_queries, _ = block_ids.shape
    num_lists, entries = batch * groups * num_blocks, block_ids.size
    row = jnp.arange(batch * groups, dtype=jnp.int32).reshape(batch, groups, 1, 1)
    keys = jnp.where(block_ids >= 0, row * num_blocks + block_ids, num_lists).reshape(-1)
    query = jnp.broadcast_to(
        jnp.arange(num_queries, dtype=jnp.int32)[:, None], block_ids.shape
    ).reshape(-1)
    keys, queries = jax.lax.sort((keys, query), num_keys=1, is_stable=True)
    numbers = jnp.arange(num_lists + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(keys, numbers, method="scan_unrolled").astype(jnp.int32)
    parts = -(-(starts[1:] - starts[:-1]) // queries_per_slice)
    first_slices = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(parts, dtype=jnp.int32)])
    # Whatever way the entries are spread, there are no more slices than that.
    items = entries // queries_per_slice + min(num_lists, entries)
    item = jnp.arange(items, dtype=jnp.int32)
    owner = jnp.searchsorted(first_slices, item, side="right", method="scan_unrolled") - 1
    owner = jnp.minimum(owner.astype(jnp.int32), num_lists - 1)
    end = starts[owner + 1]
    first = jnp.minimum(starts[owner] + (item - first_slices[owner]) * queries_per_slice, end)
    last = jnp.minimum(first + queries_per_slice, end)
    return BlockLists(queries, jnp.stack([owner, first, last], axis=1), first_slices)
