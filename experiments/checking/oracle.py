"""Attention by its definition in float64, for sampled queries; shares no code with the kernels.

float64 is switched on around the oracle alone: the kernels are traced as they are by default.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Of gathered keys, or of token scores, at a time.
CHUNK_BYTES = 2**29


class Queries(NamedTuple):
    """Sampled queries.

    Attributes:
      rows: their indices, the same in each batch row.
      slots: the key slots that they sit in.
      first_blocks: of their documents; past all blocks for padding.
      segment_ids: document of each key slot, or None.
    """

    rows: Int[np.ndarray, "R"]
    slots: Int[np.ndarray, "B R"]
    first_blocks: Int[np.ndarray, "B R"]
    segment_ids: Int[np.ndarray, "B S"] | None


def attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    queries: Queries,
    block_size: int,
) -> tuple[Float[np.ndarray, "B R Hq D"], Float[np.ndarray, "B R Hq"]]:
    """Output and log-sum-exp; 0 and -inf where a query sees nothing. Scores are over sqrt(D)."""
    outputs, log_sums = [], []
    with jax.enable_x64(True):
        for row in range(len(q)):
            segments = None if queries.segment_ids is None else queries.segment_ids[row]
            # Copies of the rows: q itself may take half of the device's memory.
            sampled = jnp.asarray(q)[row, queries.rows]
            ids = block_ids[row][:, queries.rows].swapaxes(0, 1)
            slots = jnp.asarray(queries.slots[row], jnp.int32)
            o, lse = _attend(sampled, k, v, ids, slots, segments, row, block_size)
            outputs.append(np.asarray(o))
            log_sums.append(np.asarray(lse))
    return np.stack(outputs), np.stack(log_sums)


@functools.partial(jax.jit, static_argnums=(7,))
def _attend(q, k, v, block_ids, slots, segment_ids, row, block_size):
    """One batch row: [R, Hq, D] and [R, Hq]."""
    groups, head_dim = k.shape[2:]
    num_keys, per_group = k.shape[1], q.shape[1] // groups
    offsets = jnp.arange(block_size, dtype=jnp.int32)
    group = jnp.arange(groups)[:, None]

    def one(query):
        q, ids, slot = query
        keys = (ids[..., None] * block_size + offsets).reshape(groups, -1)
        valid = (ids >= 0) & ~_repeated(ids)
        visible = jnp.repeat(valid, block_size, -1) & (keys <= slot) & (keys < num_keys)
        keys = jnp.clip(keys, 0, num_keys - 1)
        if segment_ids is not None:
            visible &= (segment_ids[keys] == segment_ids[slot]) & (segment_ids[slot] > 0)
        q = q.astype(jnp.float64).reshape(groups, per_group, head_dim)
        scores = jnp.einsum("hgd,hsd->hgs", q, k[row, keys, group].astype(jnp.float64))
        scores = jnp.where(visible[:, None], scores * head_dim**-0.5, -jnp.inf)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1, total)
        o = jnp.einsum("hgs,hsd->hgd", weights, v[row, keys, group].astype(jnp.float64))
        lse = jnp.log(total) + jnp.where(top == -jnp.inf, 0, top)
        return o.reshape(-1, head_dim), lse.reshape(-1)

    gathered = 16 * groups * block_ids.shape[-1] * block_size * head_dim
    batch = max(1, min(len(q), CHUNK_BYTES // gathered))
    return jax.lax.map(one, (q, block_ids, slots), batch_size=batch)


def _repeated(ids: Int[Array, "H K"]) -> Array:
    """True where an id stood further left already."""
    same = ids[:, :, None] == ids[:, None, :]
    return (same & jnp.tri(ids.shape[-1], k=-1, dtype=bool)).any(-1)
