"""Which key slots a query sees, and the map over query chunks that bounds the references' memory.

Query t sits in slot `query_offset + t` and sees key slot j when j is not later, both hold the same
document (`segment_ids`, 0 is padding) and, with a window, j is one of the last `window` slots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bytes that one chunk's largest intermediate may take. Small enough for 32K tokens in 4 GB with a
# few such intermediates alive, large enough that short sequences are one chunk.
CHUNK_BYTES = 64 * 2**20


def query_slots(
    batch: int, num_queries: int, query_offset: int | Int[Array, "B"]
) -> Int[Array, "B T"]:
    """The key slot that each query sits in."""
    offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    return offset[:, None] + jnp.arange(num_queries, dtype=jnp.int32)


def segments_at(
    segment_ids: Int[Array, "B S"] | None, slots: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Each query's document; without segments all are document 1."""
    if segment_ids is None:
        return jnp.ones_like(slots)
    return jnp.take_along_axis(segment_ids, slots, axis=1, mode="clip")


def visible_slots(
    slots: Int[Array, "B T"],
    num_keys: int,
    segment_ids: Int[Array, "B S"] | None,
    window: int = 0,
) -> Bool[Array, "B T S"]:
    """The causal mask over key slots, within documents and the window (0: no window)."""
    keys = jnp.arange(num_keys, dtype=jnp.int32)
    distance = slots[..., None] - keys
    visible = distance >= 0
    if window:
        visible &= distance < window
    if segment_ids is not None:
        own = segments_at(segment_ids, slots)
        visible &= (own[..., None] == segment_ids[:, None, :]) & (own > 0)[..., None]
    return visible


def document_starts(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The slot at which each slot's document begins."""
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segment_ids != before, slots, 0), axis=1)


def map_query_chunks[R](
    fn: Callable[..., R], *arrays: Array | None, bytes_per_query: int, query_axis: int = 1
) -> R:
    """Applies `fn` to chunks of queries and joins the results along `query_axis`.

    The chunk is as long as `CHUNK_BYTES` allows. More than one chunk runs in sequence, and the
    backward pass recomputes each chunk, so that memory does not grow with the number of queries.

    Args:
      fn: takes the arrays' chunks, returns a pytree of arrays with queries on `query_axis`.
      *arrays: queries on axis 1; None is passed through.
      bytes_per_query: size of `fn`'s largest intermediate per query, over the whole batch.
      query_axis: of the results.
    """
    num_queries = next(array.shape[1] for array in arrays if array is not None)
    chunk = max(1, min(num_queries, CHUNK_BYTES // max(1, bytes_per_query)))
    if chunk == num_queries:
        return fn(*arrays)
    num_chunks = -(-num_queries // chunk)
    padding = num_chunks * chunk - num_queries

    def split(array):
        padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(len(array), num_chunks, chunk, *array.shape[2:]), 1, 0)

    def join(chunks):
        whole = jnp.moveaxis(chunks, 0, query_axis)
        shape = (*whole.shape[:query_axis], num_chunks * chunk, *whole.shape[query_axis + 2 :])
        return jax.lax.slice_in_dim(whole.reshape(shape), 0, num_queries, axis=query_axis)

    # The barrier that checkpoint adds against recomputation being merged away is not needed in a
    # loop body.
    body = jax.checkpoint(lambda parts: fn(*parts), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(body, jax.tree.map(split, arrays)))
