"""Selections that no index branch makes: fixed patterns and the oracle, for sweeps and analysis.

They differ from learned selection in the block scores alone: visibility, forced blocks and top-k
are the same code. A pattern is a function of the query's place in its document, so cached decoding
and packing give the same selection as the document alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.select_blocks.reference import choose_blocks, forced_blocks, main_block_mass
from pallas_kernels.visibility import document_starts, map_query_chunks

PATTERNS = ("strided", "random", "random_per_block", "sink_window", "oracle")


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
    if segment_ids is None:
        starts = jnp.zeros_like(slots)
    else:
        starts = jnp.take_along_axis(document_starts(segment_ids), slots, axis=1, mode="clip")
    query = (slots - starts)[:, None, :, None]
    block = jnp.arange(num_blocks) - (starts // block_size)[:, None, :, None]
    own = query // block_size
    if pattern == "sink_window":
        scores = block  # the sinks are forced
    elif pattern == "strided":
        # Blocks 0..own fall into top_k equal strides; the first of each leads, then the nearest.
        stride, previous = (block * top_k) // (own + 1), ((block - 1) * top_k) // (own + 1)
        scores = jnp.where(stride != previous, block + num_blocks, block)
    elif pattern == "random":
        scores = _hash(query, block, groups[:, None, None])
    elif pattern == "random_per_block":
        scores = _hash(own, block, groups[:, None, None])
    else:
        raise ValueError(f"pattern={pattern!r}: choose one of {', '.join(PATTERNS)}")
    shape = (len(slots), len(groups), slots.shape[1], num_blocks)
    return jnp.broadcast_to(scores.astype(jnp.float32), shape)


def _hash(*words: Int[Array, "..."]) -> Float[Array, "..."]:
    """Uniform numbers in [0, 1) from integers: multiply, xor and shift until the bits are mixed."""
    state = jnp.uint32(0x9E3779B9)
    for word in words:
        state = (state ^ word.astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        state = (state ^ (state >> 13)) * jnp.uint32(0xC2B2AE35)
        state = state ^ (state >> 16)
    return (state >> 8).astype(jnp.float32) / 2**24
