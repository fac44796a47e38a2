"""Block selection by its definition in float64, for sampled queries; see `oracle`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.checking.oracle import CHUNK_BYTES, Queries


class BlockScores(NamedTuple):
    """What a selection is held to.

    Attributes:
      scores: of blocks; -inf where the query sees none of it, inf where it is forced.
      size: the largest absolute score of a visible token, what gaps are relative to.
    """

    scores: Float[np.ndarray, "B R H N"]
    size: Float[np.ndarray, "B R H"]


def block_scores(
    index_q: Float[Array, "B R H Di"],
    index_k: Float[Array, "B S Di"],
    key_scales: Float[Array, "B S"] | None,
    queries: Queries,
    *,
    block_size: int,
    local_blocks: int,
    sink_blocks: int,
) -> BlockScores:
    """Maxima over a block's visible tokens, unscaled, with the forced blocks.

    Args:
      index_q: the sampled queries alone.
      index_k: keys.
      key_scales: factor of each key's scores, for an 8-bit index; a query's own factor does not
        matter to its order.
      queries: where they are.
      block_size: Bk.
      local_blocks: forced, the query's own one and those before it.
      sink_blocks: forced, the first ones of its document.
    """
    pooled, sizes = [], []
    with jax.enable_x64(True):
        for row in range(len(index_q)):
            segments = None if queries.segment_ids is None else queries.segment_ids[row]
            scales = None if key_scales is None else key_scales[row]
            slots = jnp.asarray(queries.slots[row], jnp.int32)
            scores, size = _pool(index_q[row], index_k[row], scales, slots, segments, block_size)
            pooled.append(np.array(scores))
            sizes.append(np.asarray(size))
    scores = np.stack(pooled)
    blocks = np.arange(scores.shape[-1])
    for row in range(len(index_q)):
        own = queries.slots[row][:, None] // block_size
        first = queries.first_blocks[row][:, None]
        local = (blocks > own - local_blocks) & (blocks <= own) & (blocks >= first)
        sinks = (blocks >= first) & (blocks < first + sink_blocks) & (blocks <= own)
        scores[row][np.broadcast_to((local | sinks)[:, None], scores[row].shape)] = np.inf
    return BlockScores(scores, np.stack(sizes))


@functools.partial(jax.jit, static_argnums=(5,))
def _pool(index_q, index_k, key_scales, slots, segment_ids, block_size):
    """One batch row: block scores [R, H, N] and the largest absolute token scores [R, H]."""
    num_keys = len(index_k)
    padding = -num_keys % block_size
    keys = index_k.astype(jnp.float64)

    def one(query):
        q, slot = query
        scores = jnp.einsum("hd,sd->hs", q.astype(jnp.float64), keys)
        if key_scales is not None:
            scores = scores * key_scales.astype(jnp.float64)
        visible = jnp.arange(num_keys) <= slot
        if segment_ids is not None:
            visible &= (segment_ids == segment_ids[slot]) & (segment_ids[slot] > 0)
        size = jnp.where(visible, jnp.abs(scores), 0).max(-1)
        scores = jnp.where(visible, scores, -jnp.inf)
        scores = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        return scores.reshape(len(q), -1, block_size).max(-1), size

    batch = max(1, min(len(index_q), CHUNK_BYTES // (8 * index_q.shape[1] * num_keys)))
    return jax.lax.map(one, (index_q, slots), batch_size=batch)


def choose(scores: Float[np.ndarray, "... N"], top_k: int) -> Int[np.ndarray, "... K"]:
    """The ids of the K largest scores, lower ids first among equals, never -inf; ascending."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]
    absent = scores.shape[-1]
    chosen = np.take_along_axis(scores, order, -1) > -np.inf
    ids = np.sort(np.where(chosen, order, absent), -1)
    ids = np.where(ids == absent, -1, ids)
    missing = [(0, 0)] * (ids.ndim - 1) + [(0, top_k - ids.shape[-1])]
    return np.pad(ids, missing, constant_values=-1)
