"""Softmax attention under a mask, in query chunks: oracle and fallback of the dense op."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.residuals import named
from pallas_kernels.visibility import map_query_chunks, visible_slots


def dense_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    window: int,
    scale: float,
    return_lse: bool,
) -> tuple[Float[Array, "..."], ...]:
    """Causal attention over all visible tokens: the output, and the log-sum-exp if wanted."""

    def attend(q, slots, k, v, segment_ids):
        mask = visible_slots(slots, k.shape[1], segment_ids, window)[:, None, None]
        o, lse = masked_attention(q, k, v, mask, scale)
        return o, lse.swapaxes(1, 2)

    o, lse = map_query_chunks(
        attend, (q,), (k, v, segment_ids), query_offset, bytes_per_query=score_bytes(q, k)
    )
    o, lse = named(o, lse.swapaxes(1, 2))
    return (o, lse) if return_lse else (o,)


def accumulator_dtype(array: Array) -> jnp.dtype:
    """float32 for everything up to float32, float64 for the float64 oracle."""
    return jnp.promote_types(array.dtype, jnp.float32)


def score_bytes(q: Float[Array, "B T H D"], k: Float[Array, "B S *Hkv D"]) -> int:
    """Bytes of all heads' scores of one query, over batch and keys."""
    return q.shape[0] * q.shape[2] * k.shape[1] * accumulator_dtype(q).itemsize


def head_scores(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B S Hkv D"], scale: float
) -> Float[Array, "B Hkv G T S"]:
    """Scaled q.k of every query head with its group's keys."""
    batch, num_queries, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, num_queries, k.shape[2], num_heads // k.shape[2], head_dim)
    scores = jnp.einsum(
        "btrgd,bsrd->brgts",
        grouped,
        k,
        precision="highest",
        preferred_element_type=accumulator_dtype(q),
    )
    return scores * scale


def masked_log_sum_exp(
    scores: Float[Array, "*batch S"], mask: Bool[Array, "..."]
) -> tuple[Float[Array, "*batch S"], Float[Array, "*batch"]]:
    """Softmax probabilities over the masked last axis, and the log-sum-exp.

    A row with nothing visible has probabilities 0 and log-sum-exp -inf, and zero gradients.
    """
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return weights / total, lse[..., 0]


def masked_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    mask: Bool[Array, "B #Hkv 1 T S"],
    scale: float,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Exact softmax attention of every head over the slots of `mask`."""
    probabilities, lse = masked_log_sum_exp(head_scores(q, k, scale), mask)
    o = jnp.einsum(
        "brgts,bsrd->btrgd",
        probabilities,
        v.astype(probabilities.dtype),
        precision="highest",
    )
    return o.reshape(q.shape).astype(q.dtype), lse.reshape(q.shape[0], q.shape[2], q.shape[1])
