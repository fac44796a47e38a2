"""Block selection by its definition: token scores, block scores, the forced blocks, exact top-k."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_attention.reference import (
    accumulator_dtype,
    head_scores,
    masked_log_sum_exp,
    score_bytes,
)
from pallas_kernels.pages import gather_pages
from pallas_kernels.select_blocks.quantization import quantize_keys, quantize_queries
from pallas_kernels.visibility import (
    document_starts,
    map_query_chunks,
    visible_slots,
)


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
    """The ids of the K best blocks per query and group, ascending, then -1."""
    query_scales = key_scales = None
    if index_precision == "int8":
        dtype = accumulator_dtype(index_q)
        index_q, query_scales = quantize_queries(index_q)
        index_k, key_scales = quantize_keys(index_k, block_size)
        key_scales = jnp.repeat(key_scales, block_size, axis=1)[:, : index_k.shape[1]]
        # Sums of up to 1024 products of 8-bit integers are exact in float32.
        index_q, index_k = index_q.astype(dtype), index_k.astype(dtype)

    def select(index_q, query_scales, slots, index_k, key_scales, segment_ids):
        num_keys = index_k.shape[1]
        if query_scales is None:
            scores = index_scores(index_q, index_k, scale)
        else:
            scores = index_scores(index_q, index_k, 1.0) * key_scales[:, None, None]
            scores = scores * query_scales.swapaxes(1, 2)[..., None] * scale
        visible = visible_slots(slots, num_keys, segment_ids)[:, None]
        blocks = pool_blocks(scores, visible, block_size, pooling)
        forced = forced_blocks(
            slots, segment_ids, num_keys, block_size, num_local_blocks, num_sink_blocks
        )
        return choose_blocks(blocks, forced[:, None], top_k).swapaxes(1, 2)

    ids = map_query_chunks(
        select,
        (index_q, query_scales),
        (index_k, key_scales, segment_ids),
        query_offset,
        bytes_per_query=score_bytes(index_q, index_k),
    )
    return ids.swapaxes(1, 2)


def select_blocks_of_pages(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "P Bk Di"],
    segment_ids: None,
    query_offset: Int[Array, "B"] | int,
    *,
    page_table: Int[Array, "B N"],
    **options: Any,
) -> Int[Array, "B Hkv T K"]:
    """`select_blocks` of paged index keys, gathered into one array."""
    keys = gather_pages(index_k, page_table)
    return select_blocks(index_q, keys, segment_ids, query_offset, **options)


def index_scores(
    index_q: Float[Array, "B T Hkv Di"], index_k: Float[Array, "B S Di"], scale: float
) -> Float[Array, "B Hkv T S"]:
    """s[i, j, r]: one light head per group against the one shared index key."""
    scores = jnp.einsum(
        "btri,bsi->brts",
        index_q,
        index_k,
        precision="highest",
        preferred_element_type=accumulator_dtype(index_q),
    )
    return scores * scale


def pool_blocks(
    scores: Float[Array, "B H T S"], visible: Bool[Array, "B 1 T S"], block_size: int, pooling: str
) -> Float[Array, "B H T N"]:
    """m[i, b, r]: visible token scores to block scores; -inf where nothing or a NaN is visible."""
    scores = split_blocks(jnp.where(visible, scores, -jnp.inf), block_size, -jnp.inf)
    if pooling == "max":
        blocks = scores.max(-1)
    elif pooling == "lse":
        blocks = jax.nn.logsumexp(scores, axis=-1)
    else:
        visible = split_blocks(visible, block_size, False)
        total = jnp.where(visible, scores, 0).sum(-1)
        blocks = jnp.where(visible.any(-1), total / jnp.maximum(visible.sum(-1), 1), -jnp.inf)
    return jnp.where(jnp.isnan(scores).any(-1), -jnp.inf, blocks)


def split_blocks(array: Array, block_size: int, fill: float | bool) -> Array:
    """Splits the last axis into blocks, the ragged last one filled up: [..., S] to [..., N, Bk]."""
    num_blocks = -(-array.shape[-1] // block_size)
    padding = num_blocks * block_size - array.shape[-1]
    widths = [(0, 0)] * (array.ndim - 1) + [(0, padding)]
    padded = jnp.pad(array, widths, constant_values=fill)
    return padded.reshape(*array.shape[:-1], num_blocks, block_size)


def forced_blocks(
    slots: Int[Array, "B T"],
    segment_ids: Int[Array, "B S"] | None,
    num_keys: int,
    block_size: int,
    num_local_blocks: int,
    num_sink_blocks: int,
) -> Bool[Array, "B T N"]:
    """The query's own block, those just before it, and the first of its document."""
    num_blocks = -(-num_keys // block_size)
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    own = slots[..., None] // block_size
    if segment_ids is None:
        first = jnp.zeros_like(own)
        real = jnp.ones_like(own, bool)
    else:
        starts = jnp.take_along_axis(document_starts(segment_ids), slots, axis=1, mode="clip")
        first = starts[..., None] // block_size
        real = jnp.take_along_axis(segment_ids, slots, axis=1, mode="clip")[..., None] > 0
    local = (blocks <= own) & (blocks > own - num_local_blocks) & (blocks >= first)
    sink = (blocks >= first) & (blocks < first + num_sink_blocks) & (blocks <= own)
    return (local | sink) & real


def choose_blocks(
    blocks: Float[Array, "B H T N"], forced: Bool[Array, "B #H T N"], top_k: int
) -> Int[Array, "B H T K"]:
    """Exact top-k: forced blocks, then score descending, then lower id; -inf is never chosen."""
    blocks = jnp.where(jnp.isnan(blocks), -jnp.inf, blocks)
    blocks = jnp.where(blocks == 0, 0, blocks)  # -0 equals +0; a total order would not say so
    blocks = jnp.minimum(blocks, jnp.finfo(blocks.dtype).max)  # an overflow is not a forced block
    blocks = jnp.where(forced, jnp.inf, blocks)
    num_blocks = blocks.shape[-1]
    widths = [(0, 0)] * (blocks.ndim - 1) + [(0, max(0, top_k - num_blocks))]
    blocks = jnp.pad(blocks, widths, constant_values=-jnp.inf)
    scores, ids = jax.lax.top_k(blocks, top_k)  # stable: the lower id first among equals
    absent = blocks.shape[-1]
    ids = jnp.sort(jnp.where(scores == -jnp.inf, absent, ids), axis=-1)
    return jnp.where(ids == absent, -1, ids).astype(jnp.int32)


def main_block_mass(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
) -> Float[Array, "B Hkv T N"]:
    """Share of dense main-branch attention per block, the mean over a group's heads."""
    num_blocks = -(-k.shape[1] // block_size)

    def mass(q, slots, k, segment_ids):
        visible = visible_slots(slots, k.shape[1], segment_ids)[:, None, None]
        probabilities, _ = masked_log_sum_exp(head_scores(q, k, scale), visible)
        blocks = split_blocks(probabilities.mean(2), block_size, 0.0).sum(-1).swapaxes(1, 2)
        unseen = num_blocks - blocks.shape[-1]
        return jnp.pad(blocks, [(0, 0), (0, 0), (0, 0), (0, unseen)])

    blocks = map_query_chunks(
        mass, (q,), (k, segment_ids), query_offset, bytes_per_query=score_bytes(q, k)
    )
    return blocks.swapaxes(1, 2)
