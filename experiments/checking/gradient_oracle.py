"""Gradients of sparse attention by their definition in float64, for whole calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def exact_gradients(
    arrays: tuple[Array, ...],
    block_ids: Int[Array, "B Hkv T K"],
    slots: Int[Array, "B T"],
    segment_ids: Int[Array, "B S"] | None,
    shape,
) -> tuple[Float[np.ndarray, "..."], ...]:
    """dQ, dK and dV by their definition in float64, with all scores of a group at a time.

    Args:
      arrays: q, k, v and the cotangents of output and log-sum-exp.
      block_ids: of the queries.
      slots: that the queries sit in.
      segment_ids: document of each key slot, or None.
      shape: block size and sizes.
    """
    q, k, v, do, dlse = arrays
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    segments = jnp.ones(k.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    with jax.enable_x64(True):
        by_group = functools.partial(jnp.reshape, shape=(batch, queries, groups, -1, head_dim))
        found: list[list[np.ndarray]] = [[], [], []]
        for row, group in np.ndindex(batch, groups):
            one = (by_group(q)[row, :, group], k[row, :, group], v[row, :, group])
            both = by_group(do)[row, :, group], dlse.reshape(batch, groups, -1, queries)[row, group]
            ids = block_ids[row, group]
            for parts, part in zip(
                found,
                _exact(*one, *both, ids, slots[row], segments[row], shape.block_size),
                strict=True,
            ):
                parts.append(np.asarray(part))
    dq, dk, dv = (np.stack(parts) for parts in found)
    dq = np.moveaxis(dq.reshape(batch, groups, *dq.shape[1:]), 1, 2)
    dk, dv = (np.moveaxis(x.reshape(batch, groups, *x.shape[1:]), 1, 2) for x in (dk, dv))
    return dq.reshape(batch, queries, heads, head_dim), dk, dv


def seen_keys(
    block_ids: Int[Array, "T K"] | None,
    slots: Int[Array, "T"],
    segments: Int[Array, "S"],
    block_size: int,
) -> Bool[Array, "T S"]:
    """What each query of a batch row and group sees, of the blocks it picked or of all."""
    keys, own = jnp.arange(len(segments)), segments[slots]
    seen = (keys <= slots[:, None]) & (own[:, None] == segments) & (own > 0)[:, None]
    if block_ids is None:
        return seen
    picked = (block_ids[..., None] == jnp.arange(-(-len(keys) // block_size))).any(1)
    return seen & jnp.repeat(picked, block_size, axis=1)[:, : len(keys)]


@functools.partial(jax.jit, static_argnums=(8,))
def _exact(q, k, v, do, dlse, block_ids, slots, segments, block_size):
    """One batch row and group: q and do [T, G, D], k and v [S, D], dlse [G, T]."""
    q, k, v, do, dlse = (array.astype(jnp.float64) for array in (q, k, v, do, dlse))
    scale, seen = q.shape[-1] ** -0.5, seen_keys(block_ids, slots, segments, block_size)
    scores = jnp.where(seen[:, None], jnp.einsum("tgd,sd->tgs", q, k) * scale, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    p = weights / jnp.where(total == 0, 1, total)
    dp = jnp.einsum("tgd,sd->tgs", do, v)
    delta = (p * dp).sum(-1, keepdims=True) - dlse.T[..., None]
    ds = p * (dp - delta) * scale
    return (
        jnp.einsum("tgs,sd->tgd", ds, k),
        jnp.einsum("tgs,tgd->sd", ds, q),
        jnp.einsum("tgs,tgd->sd", p, do),
    )
