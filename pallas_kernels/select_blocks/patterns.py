"""Selections that no index branch makes: fixed patterns and the oracle, for sweeps and analysis.

Most differ from learned selection in the block scores alone: visibility, forced blocks and top-k
are the same code. What the queries of a block have in common, `BY_BLOCK`, needs no scores, and is
written down at a cost that does not grow with the number of keys. A pattern is a function of the
query's place in its document, so cached decoding and packing give the same selection as the
document alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.select_blocks.reference import choose_blocks, forced_blocks, main_block_mass
from pallas_kernels.visibility import (
    document_starts,
    map_query_chunks,
    query_slots,
    segments_at,
)

BY_BLOCK = ("random_per_block", "sink_window")
PATTERNS = ("strided", "random", *BY_BLOCK, "oracle")


def select_pattern(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    groups: Int[Array, "Hkv"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    pattern: str,
    block_size: int,
    top_k: int,
    num_local_blocks: int,
    num_sink_blocks: int,
    scale: float,
) -> Int[Array, "B Hkv T K"]:
    """Block ids of one of `PATTERNS`; `groups` numbers the KV groups for the random ones."""
    if pattern in BY_BLOCK:
        window = num_local_blocks if pattern == "random_per_block" else top_k - num_sink_blocks
        slots = query_slots(q.shape[0], q.shape[1], query_offset)
        return _sinks_draws_and_window(
            slots, segment_ids, groups, block_size, top_k, num_sink_blocks, window
        )
    mass = None
    if pattern == "oracle":
        mass = main_block_mass(q, k, segment_ids, query_offset, block_size=block_size, scale=scale)
        mass = jax.lax.stop_gradient(mass).swapaxes(1, 2)

    def select(_, mass, slots, k, segment_ids):
        num_keys = k.shape[1]
        num_blocks = -(-num_keys // block_size)

        def forced(num_local, num_sink):
            blocks = forced_blocks(slots, segment_ids, num_keys, block_size, num_local, num_sink)
            return blocks[:, None]

        if mass is None:
            scores = _pattern_scores(
                pattern, slots, segment_ids, groups, num_blocks, block_size, top_k
            )
        else:
            scores = mass.swapaxes(1, 2)[..., :num_blocks]
        past = forced(num_blocks, 0)  # as many local blocks as there are: the whole past
        scores = jnp.where(past, scores, -jnp.inf)
        ids = choose_blocks(scores, forced(num_local_blocks, num_sink_blocks), top_k)
        return ids.swapaxes(1, 2)

    blocks_per_query = len(q) * len(groups) * -(-k.shape[1] // block_size)
    ids = map_query_chunks(
        select,
        (q, mass),
        (k, segment_ids),
        query_offset,
        bytes_per_query=blocks_per_query * max(4, top_k),
    )
    return ids.swapaxes(1, 2)


def _pattern_scores(
    pattern: str,
    slots: Int[Array, "B T"],
    segment_ids: Int[Array, "B S"] | None,
    groups: Int[Array, "Hkv"],
    num_blocks: int,
    block_size: int,
    top_k: int,
) -> Float[Array, "B Hkv T N"]:
    """Scores whose top-k is the pattern; blocks and queries count from the document's start."""
    starts = _starts(slots, segment_ids)
    query = (slots - starts)[:, None, :, None]
    block = jnp.arange(num_blocks) - (starts // block_size)[:, None, :, None]
    own = query // block_size
    if pattern == "strided":
        # Blocks 0..own fall into top_k equal strides; the first of each leads, then the nearest.
        stride, previous = (block * top_k) // (own + 1), ((block - 1) * top_k) // (own + 1)
        scores = jnp.where(stride != previous, block + num_blocks, block)
    elif pattern == "random":
        scores = _hash(query, block, groups[:, None, None])
    else:
        raise ValueError(f"pattern={pattern!r}: choose one of {', '.join(PATTERNS)}")
    shape = (len(slots), len(groups), slots.shape[1], num_blocks)
    return jnp.broadcast_to(scores.astype(jnp.float32), shape)


def _sinks_draws_and_window(
    slots: Int[Array, "B T"],
    segment_ids: Int[Array, "B S"] | None,
    groups: Int[Array, "Hkv"],
    block_size: int,
    top_k: int,
    num_sinks: int,
    window: int,
) -> Int[Array, "B Hkv T K"]:
    """The first blocks of the document, random ones, the last `window`: K together."""
    first = (_starts(slots, segment_ids) // block_size)[:, None, :, None]
    own = slots[:, None, :, None] // block_size - first
    place = jnp.arange(top_k, dtype=jnp.int32)
    ids = jnp.where(place < num_sinks, place, own - (top_k - 1) + place)
    ids = jnp.broadcast_to(ids, (len(slots), len(groups), slots.shape[1], top_k))
    num_draws = top_k - num_sinks - window
    if num_draws:
        free = own + 1 - num_sinks - window
        drawn = num_sinks + _distinct_draws(own, groups[:, None, None], free, num_draws)
        ids = ids.at[..., num_sinks : num_sinks + num_draws].set(drawn)
    ids = jnp.where(own < top_k, place, ids)  # nothing to choose from yet
    real = (segments_at(segment_ids, slots) > 0)[:, None, :, None]
    return jnp.where((ids <= own) & real, ids + first, -1)


def _distinct_draws(
    own: Int[Array, "B 1 T 1"],
    group: Int[Array, "Hkv 1 1"],
    size: Int[Array, "B 1 T 1"],
    count: int,
) -> Int[Array, "B Hkv T count"]:
    """`count` of the numbers 0 to size - 1, ascending, all subsets equally likely (R. Floyd).

    Bentley and Floyd, "A sample of brilliance", Communications of the ACM 30(9), 1987.
    """
    batch, _, num_queries, _ = own.shape
    drawn = jnp.zeros((batch, len(group), num_queries, 0), jnp.int32)
    for turn in range(count):
        last = size - count + turn
        draw = (_hash(own, jnp.int32(turn), group) * (last + 1)).astype(jnp.int32)
        taken = (drawn == draw).any(-1, keepdims=True)
        drawn = jnp.concatenate([drawn, jnp.where(taken, last, draw)], axis=-1)
    return jnp.sort(drawn, axis=-1)


def _starts(slots: Int[Array, "B T"], segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B T"]:
    """The slot at which each query's document begins."""
    if segment_ids is None:
        return jnp.zeros_like(slots)
    return jnp.take_along_axis(document_starts(segment_ids), slots, axis=1, mode="clip")


def _hash(*words: Int[Array, "..."]) -> Float[Array, "..."]:
    """Uniform numbers in [0, 1) from integers: multiply, xor and shift until the bits are mixed."""
    state = jnp.uint32(0x9E3779B9)
    for word in words:
        state = (state ^ word.astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        state = (state ^ (state >> 13)) * jnp.uint32(0xC2B2AE35)
        state = state ^ (state >> 16)
    return (state >> 8).astype(jnp.float32) / 2**24
