"""Checks value and gradients of one call of `index_kl`: against float64, and twice."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.benchmarking import checks
from experiments.benchmarking.inputs import index_inputs
from experiments.checking import attention, selections
from experiments.checking.cases import (
    GRADIENT_ERRORS,
    KL_ERROR,
    LSE_ERROR,
    PREFIX,
    AlignmentCase,
)
from experiments.checking.gradient_oracle import seen_keys
from experiments.checking.judgement import Figure
from experiments.checking.poison import poisoned
from pallas_kernels import BlockSelection, index_kl


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


def check(case: AlignmentCase, implementation: str) -> dict[str, Figure]:
    """Figures of one case: all values, and the gradients of a sum of random weights."""
    shape, place = case.shape, case.place
    q, k, _ = attention.inputs(shape, place, case.dtype)
    index_q, index_k = index_inputs(shape, "random", case.dtype)
    slots = selections.query_slots(shape, place)
    if place.num_queries:
        index_q = jnp.take_along_axis(index_q, slots[:, :, None, None], axis=1)
    block_ids = None
    if case.selection != PREFIX:
        block_ids = selections.select(case.selection, shape, place, implementation)
    segment_ids, offset = selections.segment_ids(shape, place), attention.offset_array(place)
    per_query = (shape.batch, shape.num_kv_heads, q.shape[1])
    weights = jax.random.normal(jax.random.key(shape.seed + 4), per_query, jnp.float32)
    inputs = Inputs(q, k, index_q, index_k, block_ids, segment_ids)
    expected, main_lse = exact(inputs, slots, weights, shape.block_size)
    call = _jitted(dataclasses.replace(case, selection=""), implementation)
    run = poisoned(call, *inputs, offset, main_lse.astype(np.float32), weights)
    found, again = run(), run()
    differ = any(_digest(a) != _digest(b) for a, b in zip(found, again, strict=True))
    return {"runs_that_differ": Figure(float(differ), 0)} | _errors(found, expected, case.dtype)


def _digest(array: Array) -> int:
    return int(checks.digest(array if array.ndim == 4 else array[..., None]))


def _errors(found: Results, expected: Results, dtype: str) -> dict[str, Figure]:
    kl, lse, *gradients = (np.asarray(array.astype(jnp.float32)) for array in found)
    seen = np.isfinite(expected.index_lse)
    figures = {
        "kl_error": Figure(checks.overall_error(kl, expected.kl), KL_ERROR),
        "lse_error": Figure(float(np.abs(lse[seen] - expected.index_lse[seen]).max()), LSE_ERROR),
        "empty_log_sums": Figure(float((seen != np.isfinite(lse)).sum()), 0),
    }
    for name, one in zip(Results._fields[2:], gradients, strict=True):
        error = checks.overall_error(one, getattr(expected, name))
        figures[f"{name}_error"] = Figure(error, GRADIENT_ERRORS[dtype])
    return figures


@functools.cache
def _jitted(case: AlignmentCase, implementation: str):
    place = case.place

    def call(q, k, index_q, index_k, block_ids, segment_ids, offset, main_lse, weights):
        selection = None
        if block_ids is not None:
            selection = BlockSelection(block_ids, case.shape.block_size)

        def loss(index_q, index_k):
            loss, *terms = index_kl(
                q,
                k,
                index_q,
                index_k,
                selection,
                segment_ids=segment_ids,
                query_offset=selections.query_offset(place) if offset is None else offset,
                main_lse=main_lse,
                weights=weights,
                implementation=implementation,
            )
            return loss, terms

        gradients, terms = jax.grad(loss, (0, 1), has_aux=True)(index_q, index_k)
        return Results(*terms, *gradients)

    return jax.jit(call)


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
