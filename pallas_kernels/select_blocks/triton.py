"""`select_blocks` by Triton on NVIDIA GPUs from Ampere on: what it serves."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.triton import check_served, current_target
from pallas_kernels.visibility import document_starts, query_slots, segments_at

# A program goes through all blocks that its tile of queries sees: fewer queries fill too few.
MIN_QUERIES = 16
MAX_TOP_K = 64


@in_32_bits
def select_blocks(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    top_k: int,
    num_local_blocks: int,
    num_sink_blocks: int,
    pooling: str,
    scale: float,
    index_precision: str = "native",
) -> Int[Array, "B Hkv T K"]:
    """The ids of the K best blocks per query and group, ascending, then -1.

    Raises:
      NotImplementedError: no NVIDIA GPU from Ampere on, no jax-triton, decoding, 8-bit scores, more
        than 64 blocks per query, or sizes that `check_served` refuses.
    """
    current_target()
    refuse_varying(index_q, index_k, segment_ids, query_offset)
    check_served(block_size, index_q=index_q, index_k=index_k)
    if index_precision != "native":
        raise NotImplementedError(
            f"index_precision={index_precision!r}: the Triton kernel multiplies queries and keys "
            "as they are"
        )
    if top_k > MAX_TOP_K:
        raise NotImplementedError(
            f"top_k={top_k}: the Triton kernel keeps up to {MAX_TOP_K} blocks per query"
        )
    batch, num_queries = index_q.shape[:2]
    if num_queries < MIN_QUERIES:
        raise NotImplementedError(
            f"decoding: {num_queries} queries, the Triton kernel is for {MIN_QUERIES} or more"
        )
    from pallas_kernels.select_blocks.select_triton import select

    slots = query_slots(batch, num_queries, query_offset)
    own = jnp.minimum(slots, index_k.shape[1] - 1) // block_size
    first = jnp.zeros_like(own)
    if segment_ids is not None:
        real = segments_at(segment_ids, slots) > 0
        starts = segments_at(document_starts(segment_ids), slots) // block_size
        own = jnp.where(real, own, -1)
        first = jnp.where(real, starts, jnp.iinfo(jnp.int32).max)
    return select(
        index_q,
        index_k,
        own,
        first,
        block_size=block_size,
        top_k=top_k,
        num_local_blocks=num_local_blocks,
        num_sink_blocks=num_sink_blocks,
        pooling=pooling,
        scale=float(scale),
    )
