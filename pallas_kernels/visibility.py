"""Which key slots a query sees, and the map over query chunks that bounds the references' memory.

Query t sits in slot `query_offset + t` and sees key slot j when j is not later, both hold the same
document (`segment_ids`, 0 is padding) and, with a window, j is one of the last `window` slots.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Bytes that one chunk's largest intermediate may take. Small enough for 32K tokens in 4 GB with a
# few such intermediates alive, large enough that short sequences are one chunk.
CHUNK_BYTES = 64 * 2**20

# Ranges of queries with a key prefix of their own. Four do 10/16 of the square's work, more would
# gain little and compile longer; short ones are not worth the compilation.
MAX_RANGES: int = 4
MIN_RANGE: int = 128


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


def visible_block_ids(
    block_ids: Int[Array, "B Hkv T K"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    block_size: int,
) -> Int[Array, "B Hkv T K"]:
    """The ids with -1 for blocks that their query cannot see any of, and for repeated ones.

    What is left needs no segments: a block before the query's own one is visible as a whole, the
    own one up to the query.
    """
    batch, _, num_queries, _ = block_ids.shape
    slots = query_slots(batch, num_queries, query_offset)
    visible = block_ids <= (slots // block_size)[:, None, :, None]
    # Ids ascend.
    repeated = block_ids[..., 1:] == block_ids[..., :-1]
    visible &= ~jnp.pad(repeated, ((0, 0), (0, 0), (0, 0), (1, 0)))
    if segment_ids is not None:
        documents = segment_ids[:, ::block_size]
        own = segments_at(segment_ids, slots)[:, None, :, None]
        ids = jnp.clip(block_ids, 0, documents.shape[1] - 1)
        rows = jnp.arange(batch)[:, None, None, None]
        visible &= (documents[rows, ids] == own) & (own > 0)
    return jnp.where(visible, block_ids, -1)


def document_starts(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The slot at which each slot's document begins."""
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jax.lax.cummax(jnp.where(segment_ids != before, slots, 0), axis=1)


def map_query_chunks[R](
    fn: Callable[..., R],
    queries: tuple[Array | None, ...],
    keys: tuple[Array | None, ...],
    query_offset: int | Int[Array, "B"],
    *,
    bytes_per_query: int,
    query_axis: int = 1,
) -> R:
    """Applies `fn` to chunks of queries with the keys that they may see, and joins the results.

    A chunk is as long as `CHUNK_BYTES` allows; more than one run in sequence and the backward pass
    recomputes each, so that memory does not grow with the number of queries. What fits into few
    chunks is cut into causal ranges instead, each with its own prefix of the keys, if the offset is
    known (8 x 512 tokens on a CPU: 2.4 times faster, see `experiments.benchmark_reference`).

    Args:
      fn: takes the chunks of `queries`, the chunk's slots [B, t], then the prefixes of `keys`;
        returns a pytree of arrays with queries on `query_axis`.
      queries: arrays with queries on axis 1; None is passed through.
      keys: arrays with key slots on axis 1, the first of them not None; None is passed through.
      query_offset: the key slot of the first query, per row or for all.
      bytes_per_query: size of `fn`'s largest intermediate per query, over batch and all keys.
      query_axis: of the results.
    """
    first, num_keys = jax.tree.leaves(queries)[0], jax.tree.leaves(keys)[0].shape[1]
    batch, num_queries = first.shape[:2]
    queries = (*queries, query_slots(batch, num_queries, query_offset))
    if num_queries * bytes_per_query > MAX_RANGES * CHUNK_BYTES:
        chunk = max(1, CHUNK_BYTES // bytes_per_query)
        return _map_in_sequence(fn, queries, keys, chunk, query_axis)
    parts = [
        fn(
            *jax.tree.map(lambda a, at=slice(start, stop): a[:, at], queries),
            *jax.tree.map(lambda a, n=limit: a[:, :n], keys),
        )
        for start, stop, limit in _causal_ranges(num_queries, num_keys, query_offset)
    ]
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, query_axis), *parts)


def _causal_ranges(
    num_queries: int, num_keys: int, query_offset: int | Array
) -> list[tuple[int, int, int]]:
    """(first query, end, key slots that any of them may see) of up to `MAX_RANGES` ranges."""
    if not isinstance(query_offset, int):
        return [(0, num_queries, num_keys)]
    count = max(1, min(MAX_RANGES, num_queries // MIN_RANGE))
    edges = [num_queries * i // count for i in range(count + 1)]
    return [
        (start, stop, min(num_keys, query_offset + stop))
        for start, stop in itertools.pairwise(edges)
    ]


def _map_in_sequence(fn, queries, keys, chunk: int, query_axis: int):
    """`fn` over chunks of queries, one at a time."""
    batch, num_queries = jax.tree.leaves(queries)[0].shape[:2]
    num_chunks = -(-num_queries // chunk)
    padding = num_chunks * chunk - num_queries

    def split(array):
        padded = jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, num_chunks, chunk, *array.shape[2:]), 1, 0)

    def join(chunks):
        whole = jnp.moveaxis(chunks, 0, query_axis)
        shape = (*whole.shape[:query_axis], num_chunks * chunk, *whole.shape[query_axis + 2 :])
        return jax.lax.slice_in_dim(whole.reshape(shape), 0, num_queries, axis=query_axis)

    # The barrier that checkpoint adds against recomputation being merged away is not needed in a
    # loop body.
    body = jax.checkpoint(lambda parts: fn(*parts, *keys), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(body, jax.tree.map(split, queries)))
