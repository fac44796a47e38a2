"""The KL loss and its gradients by their definition in float64, for whole calls."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.checking.gradient_oracle import seen_keys


class Inputs(NamedTuple):
    """Of a call; without block ids for the whole prefix."""

    q: Float[Array, "B T Hq D"]
    k: Float[Array, "B S Hkv D"]
    index_q: Float[Array, "B T Hkv Di"]
    index_k: Float[Array, "B S Di"]
    block_ids: Int[Array, "B Hkv T K"] | None
    segment_ids: Int[Array, "B S"] | None


class Results(NamedTuple):
    """Of a call, or exact (numpy arrays)."""

    kl: Any  # [B, Hkv, T]
    index_lse: Any  # [B, Hkv, T]
    dindex_q: Any  # [B, T, Hkv, Di]
    dindex_k: Any  # [B, S, Di]


def exact(
    inputs: Inputs,
    slots: Int[Array, "B T"],
    weights: Float[Array, "B Hkv T"],
    block_size: int,
) -> tuple[Results, Float[np.ndarray, "B Hq T"]]:
    """All by definition in float64, with all scores of a group at a time; and the main log-sum-exp.

    Args:
      inputs: of the call.
      slots: that the queries sit in.
      weights: of the loss.
      block_size: Bk.
    """
    q, k, index_q, index_k, block_ids, segment_ids = inputs
    batch, groups = k.shape[0], k.shape[2]
    segments = jnp.ones(k.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    found: list[list[np.ndarray]] = [[] for _ in range(5)]
    with jax.enable_x64(True):
        grouped = q.reshape(batch, q.shape[1], groups, -1, q.shape[3])
        for row, group in np.ndindex(batch, groups):
            seen = seen_keys(
                None if block_ids is None else block_ids[row, group],
                slots[row],
                segments[row],
                block_size,
            )
            main = grouped[row, :, group], k[row, :, group]
            index = index_q[row, :, group], index_k[row]
            exactly = _exact(*main, *index, seen, weights[row, group])
            for parts, part in zip(found, exactly, strict=True):
                parts.append(np.asarray(part))
    kl, index_lse, main_lse, d_q, d_k = (
        np.stack(parts).reshape(batch, groups, *parts[0].shape) for parts in found
    )
    main_lse = main_lse.reshape(batch, -1, q.shape[1])
    return Results(kl, index_lse, d_q.swapaxes(1, 2), d_k.sum(1)), main_lse


@jax.jit
def _exact(q, k, index_q, index_k, seen, weights):
    """One batch row and group: q [T, G, D], k [S, D], seen [T, S], weights [T]."""
    q, k, index_q, index_k = (x.astype(jnp.float64) for x in (q, k, index_q, index_k))
    scores = jnp.einsum("tgd,sd->tgs", q, k) * q.shape[-1] ** -0.5
    per_head, main_lse = _softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    teacher, scale = per_head.mean(1), index_q.shape[-1] ** -0.5
    student, lse = _softmax(jnp.where(seen, index_q @ index_k.T * scale, -jnp.inf))
    log_student = jnp.log(jnp.where(student > 0, student, 1))
    kl = (jax.scipy.special.xlogy(teacher, teacher) - teacher * log_student).sum(-1)
    d_scores = weights[:, None] * (student - teacher)
    return kl, lse, main_lse.T, d_scores @ index_k * scale, d_scores.T @ index_q * scale


def _softmax(scores):
    """Probabilities and log-sum-exp over the last axis; 0 and -inf where all scores are -inf."""
    lse = jax.nn.logsumexp(scores, -1)
    return jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), lse
