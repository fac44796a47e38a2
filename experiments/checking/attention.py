"""Checks one call of `sparse_attention`: against float64, for what is not written, and twice."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.benchmarking import checks, exact_rows
from experiments.benchmarking.cases import Case as Shape
from experiments.benchmarking.inputs import MainInputs, main_inputs
from experiments.checking import oracle, selections
from experiments.checking.cases import AttentionCase, Place, SelectionCase
from experiments.checking.judgement import LSE_ERROR, OUTPUT_ERRORS, Figure
from experiments.checking.poison import poisoned
from pallas_kernels import BlockSelection, sparse_attention
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention.kv_outer import KVOuterConfig


class Problem(NamedTuple):
    """What schemes share.

    Attributes:
      arrays: q, k and v, the block ids, segment ids and the array of offsets or None.
      queries: that are compared.
      o: their exact output.
      lse: their exact log-sum-exp.
    """

    arrays: tuple[Any, ...]
    queries: oracle.Queries
    o: Float[np.ndarray, "B R Hq D"]
    lse: Float[np.ndarray, "B R Hq"]


def check(case: AttentionCase, implementation: str) -> dict[str, Figure]:
    """Figures of one case.

    Args:
      case: what is called.
      implementation: "mosaic_gpu", or another that has no schemes.
    """
    problem = _problem(dataclasses.replace(case, scheme="", chunked=False), implementation)
    rows = problem.queries.rows
    run = poisoned(_program(case, implementation), *problem.arrays)
    o, lse = run()
    hashes = [digest(o, lse)]
    figures = _unwritten(o, lse, problem.arrays[3], case)
    sampled = np.asarray(o[:, rows].astype(jnp.float32))
    sampled_lse = np.asarray(lse[:, :, rows]).swapaxes(1, 2)
    o = lse = None  # not two outputs of a million tokens at once
    hashes.append(digest(*run()))
    figures["runs_that_differ"] = Figure(float(hashes[0] != hashes[1]), 0)
    return _errors(sampled, sampled_lse, problem, case.dtype) | figures


@functools.lru_cache(maxsize=1)
def _problem(case: AttentionCase, implementation: str) -> Problem:
    shape, place = case.shape, case.place
    queries = sample(case)
    block_ids = selections.select(case.selection, shape, place, implementation)
    q, k, v = inputs(shape, place, case.dtype)
    exact = oracle.attention(q, k, v, block_ids, queries, shape.block_size)
    segment_ids = selections.segment_ids(shape, place)
    return Problem((q, k, v, block_ids, segment_ids, offset_array(place)), queries, *exact)


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape, place: Place, dtype: str) -> MainInputs:
    """q, k and v of a case."""
    q, k, v = main_inputs(shape, dtype)
    if place.num_queries:
        slots = selections.query_slots(shape, place)
        q = jnp.take_along_axis(q, slots[:, :, None, None], axis=1)
    return MainInputs(q, k, v)


def sample(case: AttentionCase | SelectionCase) -> oracle.Queries:
    """All queries of a case, or as many as its shape says."""
    count = case.place.num_queries or case.shape.length
    rows = np.arange(count)
    if case.shape.sampled_rows:
        rows = exact_rows.sample_rows(case.shape)
    slots = np.asarray(selections.query_slots(case.shape, case.place))[:, rows]
    first = selections.first_blocks(case.shape, case.place, slots)
    segments = selections.segment_ids(case.shape, case.place)
    return oracle.Queries(rows, slots, first, None if segments is None else np.asarray(segments))


def offset_array(place: Place) -> Array | None:
    """The offset of a call's queries where it is an array; a number is part of the program."""
    offset = selections.query_offset(place)
    return None if isinstance(offset, int) else offset


def digest(o: Array, lse: Array) -> tuple[int, int]:
    """A hash of every bit of both."""
    return int(checks.digest(o)), int(checks.digest(lse[..., None]))


def _program(case: AttentionCase, implementation: str):
    """The jitted call; the same one for cases that differ in their arrays alone."""
    shape = dataclasses.replace(case.shape, seed=0)
    return _jitted(dataclasses.replace(case, selection="", shape=shape), implementation)


@functools.cache
def _jitted(case: AttentionCase, implementation: str):
    block_size, place = case.shape.block_size, case.place

    def call(q, k, v, block_ids, segment_ids, offset):
        first = selections.query_offset(place) if offset is None else offset
        if implementation != "mosaic_gpu" or case.scheme == "auto":
            selection = BlockSelection(block_ids, block_size)
            return sparse_attention(
                q,
                k,
                v,
                selection,
                segment_ids=segment_ids,
                query_offset=first,
                implementation=implementation,
            )
        outer = KVOuterConfig(partial_bytes=1, queries_per_row=256) if case.chunked else None
        return mosaic_gpu.sparse_attention(
            q,
            k,
            v,
            block_ids,
            segment_ids,
            first,
            block_size=block_size,
            scale=q.shape[-1] ** -0.5,
            config=mosaic_gpu.SparseAttentionConfig(scheme=case.scheme, kv_outer=outer),
        )

    return jax.jit(call)


def _unwritten(o: Array, lse: Array, block_ids: Array, case: AttentionCase) -> dict[str, Figure]:
    """Counts of elements of all queries that are not finite, or not empty where they must be."""
    shape, place = case.shape, case.place
    slots = selections.query_slots(shape, place)
    segments = selections.segment_ids(shape, place)
    bad_o, bad_lse = _count_unwritten(o, lse, block_ids, slots, segments, shape.block_size)
    return {
        "unwritten_outputs": Figure(float(bad_o), 0),
        "unwritten_log_sums": Figure(float(bad_lse), 0),
    }


@functools.partial(jax.jit, static_argnums=(5,))
def _count_unwritten(o, lse, block_ids, slots, segment_ids, block_size):
    own = (slots // block_size)[:, None, :, None]
    seen = (block_ids >= 0) & (block_ids <= own)
    if segment_ids is not None:
        blocks = segment_ids[:, ::block_size]
        ids = jnp.clip(block_ids, 0, blocks.shape[1] - 1)
        row = jnp.arange(len(slots))[:, None, None, None]
        document = jnp.take_along_axis(segment_ids, slots, axis=1)[:, None, :, None]
        seen &= (blocks[row, ids] == document) & (document > 0)
    group = o.shape[2] // block_ids.shape[1]
    seen = jnp.repeat(seen.any(-1), group, axis=1)  # [B, Hq, T]
    seen_o = seen.swapaxes(1, 2)[..., None]
    bad_o = jnp.where(seen_o, ~jnp.isfinite(o), o != 0).sum(dtype=jnp.uint32)
    bad_lse = jnp.where(seen, ~jnp.isfinite(lse), lse != -jnp.inf).sum(dtype=jnp.uint32)
    return bad_o, bad_lse


def _errors(o, lse, exact: Problem, dtype: str) -> dict[str, Figure]:
    """Errors over the sampled queries that see something."""
    finite = np.isfinite(exact.lse)
    seen = finite.any(-1)
    overall, worst = OUTPUT_ERRORS[dtype]
    return {
        "error": Figure(checks.overall_error(o, exact.o), overall),
        "worst_row": Figure(checks.worst_row_error(o[seen], exact.o[seen]), worst),
        "max_error": Figure(float(np.abs(o - exact.o).max())),
        "lse_error": Figure(float(np.abs(lse[finite] - exact.lse[finite]).max()), LSE_ERROR),
        "empty_log_sums": Figure(float((finite != np.isfinite(lse)).sum()), 0),
    }
