"""Checks one call of `select_blocks`: every id's form, sampled queries against float64, twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments.benchmarking.inputs import IndexInputs, index_inputs
from experiments.checking import oracle, selection_oracle, selections
from experiments.checking.attention import offset_array, sample
from experiments.checking.cases import SelectionCase
from experiments.checking.judgement import SCORE_GAP, Figure
from experiments.checking.poison import poisoned
from pallas_kernels import select_blocks
from pallas_kernels.select_blocks import mosaic_gpu
from pallas_kernels.select_blocks.quantization import quantize_keys, quantize_queries


def check(case: SelectionCase, implementation: str) -> dict[str, Figure]:
    """Figures of one case.

    Args:
      case: what is called.
      implementation: "mosaic_gpu", or another that cannot be cut up.
    """
    place = case.place
    queries = sample(case)
    index = _inputs(case)
    arrays = (
        *index,
        selections.segment_ids(case.shape, place),
        offset_array(place),
    )
    run = poisoned(_program(case, implementation), *arrays)
    ids, again = run(), run()
    slots = selections.query_slots(case.shape, place)
    first = selections.first_blocks(case.shape, place, np.asarray(slots))
    figures = {
        "ids_out_of_form": Figure(
            float(_count_malformed(ids, slots // case.shape.block_size, jnp.asarray(first))), 0
        ),
        "runs_that_differ": Figure(float(not bool((ids == again).all())), 0),
    }
    sampled = np.asarray(ids[:, :, queries.rows]).swapaxes(1, 2)
    return _against_exact(sampled, _exact_scores(case, index, queries), case) | figures


def _inputs(case: SelectionCase) -> IndexInputs:
    shape = case.shape
    if case.inputs == "integers":
        keys = jax.random.split(jax.random.key(shape.seed))
        size = (shape.batch, shape.length)
        index_q = jax.random.randint(keys[0], (*size, shape.num_kv_heads, shape.index_dim), -2, 3)
        index_k = jax.random.randint(keys[1], (*size, shape.index_dim), -2, 3)
        index_q, index_k = index_q.astype(case.dtype), index_k.astype(case.dtype)
    else:
        index_q, index_k = index_inputs(shape, case.inputs, case.dtype)
    if case.place.num_queries:
        slots = selections.query_slots(shape, case.place)
        index_q = jnp.take_along_axis(index_q, slots[:, :, None, None], axis=1)
    return IndexInputs(index_q, index_k)


def _program(case: SelectionCase, implementation: str):
    """The jitted call; the same one for cases that differ in their arrays alone."""
    shape = dataclasses.replace(case.shape, seed=0)
    return _jitted(dataclasses.replace(case, inputs="", shape=shape), implementation)


@functools.cache
def _jitted(case: SelectionCase, implementation: str):
    shape, place = case.shape, case.place

    def call(index_q, index_k, segment_ids, offset):
        first = selections.query_offset(place) if offset is None else offset
        if case.cut_up and implementation == "mosaic_gpu":
            return mosaic_gpu.select_blocks(
                index_q,
                index_k,
                segment_ids,
                first,
                block_size=shape.block_size,
                top_k=shape.top_k,
                num_local_blocks=case.local_blocks,
                num_sink_blocks=case.sink_blocks,
                pooling="max",
                scale=shape.index_dim**-0.5,
                index_precision=case.precision,
                config=mosaic_gpu.SelectConfig(score_bytes=1, min_blocks_of_two_levels=1),
            )
        return select_blocks(
            index_q,
            index_k,
            block_size=shape.block_size,
            top_k=shape.top_k,
            num_local_blocks=case.local_blocks,
            num_sink_blocks=case.sink_blocks,
            segment_ids=segment_ids,
            query_offset=first,
            index_precision=case.precision,
            implementation=implementation,
        ).block_ids

    return jax.jit(call)


@jax.jit
def _count_malformed(
    ids: Int[Array, "B H T K"], own: Int[Array, "B T"], first: Int[Array, "B T"]
) -> Array:
    """Queries whose ids are not as many as there are to see, ascending, the own block the last."""
    own, first = own[:, None, :], first[:, None, :]
    count = jnp.clip(own - first + 1, 0, ids.shape[-1])[..., None]
    place = jnp.arange(ids.shape[-1])
    wrong = (ids >= 0) != (place < count)
    wrong |= (ids >= 0) & (ids < first[..., None])
    wrong |= (place == count - 1) & (ids != own[..., None])
    later = (place[1:] < count) & (ids[..., 1:] <= ids[..., :-1])
    return (wrong.any(-1) | later.any(-1)).sum()


def _exact_scores(
    case: SelectionCase, index: IndexInputs, queries: oracle.Queries
) -> selection_oracle.BlockScores:
    """Of the sampled queries; those of the rounded inputs where the index has 8 bits."""
    sampled, index_k, scales = index.index_q[:, queries.rows], index.index_k, None
    if case.precision == "int8":
        block_size = case.shape.block_size
        sampled, _ = jax.jit(quantize_queries)(sampled)
        index_k, by_block = jax.jit(quantize_keys, static_argnums=(1,))(index_k, block_size)
        scales = jnp.repeat(by_block, block_size, axis=1)[:, : index_k.shape[1]]
    return selection_oracle.block_scores(
        sampled,
        index_k,
        scales,
        queries,
        block_size=case.shape.block_size,
        local_blocks=case.local_blocks,
        sink_blocks=case.sink_blocks,
    )


def _against_exact(
    ids: Int[np.ndarray, "B R H K"], exact: selection_oracle.BlockScores, case: SelectionCase
) -> dict[str, Figure]:
    """How far chosen blocks score below the exact choice; equality where scores are exact."""
    best = selection_oracle.choose(exact.scores, case.shape.top_k)
    differing = (ids != best).any(-1)
    gap = _scores_of(best, exact.scores) - _scores_of(ids, exact.scores)
    gap = np.abs(gap).max(-1) / np.maximum(exact.size, 1e-30)
    ties = case.inputs == "integers" and case.precision == "native"
    return {
        "score_gap": Figure(float(gap.max()), SCORE_GAP),
        "queries_that_differ": Figure(float(differing.sum()), 0 if ties else np.inf),
    }


def _scores_of(ids, scores) -> np.ndarray:
    """The scores of chosen blocks, descending; forced ones and none are 0, and in no way equal."""
    blocks = scores.shape[-1]
    found = np.take_along_axis(scores, np.clip(ids, 0, blocks - 1), -1)
    largest = np.finfo(np.float64).max / 4
    found = np.where((ids < 0) | (ids >= blocks), -largest, np.clip(found, -largest, largest))
    return -np.sort(-found, -1)
