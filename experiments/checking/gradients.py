"""Checks the gradients of one call of `sparse_attention`: against float64, and twice."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.benchmarking import checks
from experiments.checking import attention, selections
from experiments.checking.cases import GRADIENT_ERRORS, GradientCase
from experiments.checking.judgement import Figure
from experiments.checking.poison import poisoned
from pallas_kernels import BlockSelection, sparse_attention
from pallas_kernels.residuals import LOG_SUM_EXP
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention.backward import BackwardConfig

NAMES = ("dq", "dk", "dv")


def check(case: GradientCase, implementation: str) -> dict[str, Figure]:
    """Figures of one case: all gradients are compared, of random cotangents of both results."""
    shape, place = case.shape, case.place
    q, k, v = attention.inputs(shape, place, case.dtype)
    block_ids = selections.select(case.selection, shape, place, implementation)
    segment_ids, offset = selections.segment_ids(shape, place), attention.offset_array(place)
    keys = jax.random.split(jax.random.key(shape.seed + 3))
    do = jax.random.normal(keys[0], q.shape, q.dtype)
    dlse = jax.random.normal(keys[1], (q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    call = _jitted(dataclasses.replace(case, selection=""), implementation)
    run = poisoned(call, q, k, v, block_ids, segment_ids, offset, do, dlse)
    found, again = run(), run()
    differ = any(checks.digest(a) != checks.digest(b) for a, b in zip(found, again, strict=True))
    exact = exact_gradients(
        (q, k, v, do, dlse), block_ids, selections.query_slots(shape, place), segment_ids, shape
    )
    figures = {"runs_that_differ": Figure(float(differ), 0)}
    for name, one, expected in zip(NAMES, found, exact, strict=True):
        one = np.asarray(one.astype(jnp.float32))
        error = checks.overall_error(one, expected)
        figures[f"{name}_error"] = Figure(error, GRADIENT_ERRORS[case.dtype])
        figures[f"{name}_max_error"] = Figure(float(np.abs(one - expected).max()))
    return figures


@functools.cache
def _jitted(case: GradientCase, implementation: str):
    block_size, place = case.shape.block_size, case.place

    def attend(q, k, v, block_ids, segment_ids, offset):
        first = selections.query_offset(place) if offset is None else offset
        if implementation != "mosaic_gpu":
            return sparse_attention(
                q,
                k,
                v,
                BlockSelection(block_ids, block_size),
                segment_ids=segment_ids,
                query_offset=first,
                implementation=implementation,
            )
        backward = BackwardConfig(queries_per_chunk=256 if case.chunked else None)
        return mosaic_gpu.sparse_attention(
            q,
            k,
            v,
            block_ids,
            segment_ids,
            first,
            block_size=block_size,
            scale=q.shape[-1] ** -0.5,
            config=mosaic_gpu.SparseAttentionConfig(backward=backward),
        )

    def gradients(q, k, v, block_ids, segment_ids, offset, do, dlse):
        def results(q, k, v):
            return attend(q, k, v, block_ids, segment_ids, offset)

        if case.rematerialised:
            keep = jax.checkpoint_policies.save_only_these_names(LOG_SUM_EXP)
            results = jax.checkpoint(results, policy=keep)
        if case.stacked:
            results = _twice_in_a_scan(results)
        (_, lse), pullback = jax.vjp(results, q, k, v)
        # Where nothing is visible the log-sum-exp is a constant.
        return pullback((do, jnp.where(jnp.isfinite(lse), dlse, 0)))

    return jax.jit(gradients)


def _twice_in_a_scan(results: Callable[..., tuple[Array, Array]]):
    """The same results and gradients as means over two layers of a stack.

    Attention is odd: with all its arrays negated it is the negative. So the layers differ, as XLA
    must not find them to be one, and each has half of the gradients, which is exact.
    """

    def means(*arrays):
        stack = [jnp.stack([array, -array]) for array in arrays]
        _, (o, lse) = jax.lax.scan(lambda _, layer: (None, results(*layer)), None, stack)
        return (o[0] - o[1]) / 2, (lse[0] + lse[1]) / 2

    return means


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
