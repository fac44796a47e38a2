"""Checks value and gradients of one call of `index_kl`: against float64, and twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.benchmarking import checks
from experiments.benchmarking.inputs import index_inputs
from experiments.checking import attention, selections
from experiments.checking.alignment_oracle import Inputs, Results, exact
from experiments.checking.cases import PREFIX, AlignmentCase
from experiments.checking.judgement import GRADIENT_ERRORS, KL_ERROR, LSE_ERROR, Figure
from experiments.checking.poison import poisoned
from pallas_kernels import BlockSelection, index_kl


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
