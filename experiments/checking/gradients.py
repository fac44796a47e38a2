"""Checks the gradients of one call of `sparse_attention`: against float64, and twice."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarking import checks
from experiments.checking import attention, selections
from experiments.checking.cases import GradientCase
from experiments.checking.gradient_oracle import exact_gradients
from experiments.checking.judgement import GRADIENT_ERRORS, Figure
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
