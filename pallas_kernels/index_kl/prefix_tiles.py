"""Lists of the key blocks that tiles of queries see in the whole causal prefix."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.sparse_attention.tile_lists import NUM_ROWS
from pallas_kernels.visibility import document_starts, query_slots, segments_at

# The first visible slot of a query that sees nothing; a float32 holds it.
NOWHERE = 2**30
# Lists are cut into steps of a divisor of that.
_LIST_ALIGNMENT = 32


def first_visible(
    segment_ids: Int[Array, "B S"] | None, offsets: Int[Array, "B"], num_queries: int
) -> Int[Array, "B T"]:
    """The first key slot that each query sees: its document's; NOWHERE for padding."""
    slots = query_slots(offsets.shape[0], num_queries, offsets)
    if segment_ids is None:
        return jnp.zeros_like(slots)
    starts = jnp.take_along_axis(document_starts(segment_ids), slots, axis=1, mode="clip")
    return jnp.where(segments_at(segment_ids, slots) > 0, starts, NOWHERE)


def prefix_lists(
    first: Int[Array, "B T"],
    offsets: Int[Array, "B"],
    *,
    groups: int,
    queries: int,
    num_blocks: int,
    block_size: int,
) -> Int[Array, "tiles 4 L"]:
    """Lists as of `tile_lists`, with every query a member of every block of its tile.

    They take 16 bytes per tile and block, 128 MiB for 128K tokens and 4 groups in tiles of 32 and
    blocks of 128.

    Args:
      first: of `first_visible`, T a multiple of a tile.
      offsets: the key slot of the first query.
      groups: per batch row, which see the same.
      queries: R, per tile.
      num_blocks: N, per batch row.
      block_size: key slots per block.
    """
    batch, num_queries = first.shape
    tiles = num_queries // queries
    slots = query_slots(batch, num_queries, offsets).reshape(batch, tiles, queries)
    first = first.reshape(slots.shape)
    last = jnp.where(first < NOWHERE, slots, -1).max(-1) // block_size
    begin = first.min(-1) // block_size
    count = jnp.clip(jnp.minimum(last, num_blocks - 1) - begin + 1, 0)
    place = jnp.arange(-(-num_blocks // _LIST_ALIGNMENT) * _LIST_ALIGNMENT, dtype=jnp.int32)
    within = place < count[..., None]
    blocks = jnp.where(within, begin[..., None] + place, 0)
    members = jnp.where(within, -1, 0)
    scalars = jnp.stack((count, slots[..., 0]), -1)
    scalars = jnp.pad(scalars, ((0, 0), (0, 0), (0, place.size - 2)))
    row = jnp.arange(batch * groups, dtype=jnp.int32).reshape(batch, groups, 1, 1)
    pages = jnp.where(within[:, None], row * num_blocks + blocks[:, None], 0)
    shared = jnp.stack((blocks, members, scalars), -2)[:, None]
    shared = jnp.broadcast_to(shared, (batch, groups, *shared.shape[2:]))
    lists = jnp.concatenate((pages[..., None, :], shared), -2)
    return lists.reshape(-1, NUM_ROWS, place.size)
