"""Every op by one function of the same inputs, for the tests of what all ops have in common.

`x` holds q, k, v, index_q and index_k; `place` segment_ids and query_offset; `chosen` the
implementation of the ops that have several. Results have queries on axis 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from op_cases import (
    BLOCK_SIZE,
    TOP_K,
    assert_close,
    compiled,
    index_inputs,
    integers,
    main_inputs,
    normal,
)

from pallas_kernels import (
    dense_attention,
    index_kl,
    select_blocks,
    select_pattern,
    sparse_attention,
)

BLOCKS = {"block_size": BLOCK_SIZE, "top_k": TOP_K}


def select(x, place, chosen, **options):
    selection = select_blocks(x["index_q"], x["index_k"], **BLOCKS, **options, **place, **chosen)
    return [selection.block_ids.swapaxes(1, 2)]


def select_by(pattern, x, place, chosen, **options):
    selection = select_pattern(pattern, x["q"], x["k"], **BLOCKS, **options, **place)
    return [selection.block_ids.swapaxes(1, 2)]


def attend_sparsely(x, place, chosen):
    selection = select_blocks(x["index_q"], x["index_k"], **BLOCKS, **place, **chosen)
    o, lse = sparse_attention(x["q"], x["k"], x["v"], selection, **place, **chosen)
    return [o, lse.swapaxes(1, 2)]


def attend_densely(x, place, chosen, window=0):
    o, lse = dense_attention(
        x["q"], x["k"], x["v"], window=window, return_lse=True, **place, **chosen
    )
    return [o, lse.swapaxes(1, 2)]


def align(x, place, chosen, selected=True):
    selection = None
    if selected:
        selection = select_blocks(x["index_q"], x["index_k"], **BLOCKS, **place, **chosen)
    inputs = x["q"], x["k"], x["index_q"], x["index_k"]
    weights = x["index_q"].sum(-1).swapaxes(1, 2)
    loss, kl, index_lse = index_kl(*inputs, selection, weights=weights, **place, **chosen)
    # Nothing is added to the terms but the gradient of their sum.
    kl += loss - jax.lax.stop_gradient(loss)
    return [kl.swapaxes(1, 2), index_lse.swapaxes(1, 2)]


OPS = {
    "select_blocks": select,
    "select_blocks, mean": functools.partial(select, pooling="mean", num_local_blocks=2),
    "select_blocks, lse": functools.partial(select, pooling="lse", num_sink_blocks=1),
    "strided": functools.partial(select_by, "strided"),
    "random": functools.partial(select_by, "random", num_sink_blocks=1),
    "random_per_block": functools.partial(select_by, "random_per_block", num_sink_blocks=1),
    "sink_window": functools.partial(select_by, "sink_window"),
    "oracle": functools.partial(select_by, "oracle"),
    "sparse_attention": attend_sparsely,
    "dense_attention": attend_densely,
    "dense_attention, window": functools.partial(attend_densely, window=5),
    "index_kl, selected": align,
    "index_kl, dense": functools.partial(align, selected=False),
}
IDS = tuple(op for op in OPS if "attention" not in op and "kl" not in op)
IMPLEMENTED = ("select_blocks", "sparse_attention", "dense_attention", "index_kl, selected")
READS_NO_VALUES = ("strided", "random", "random_per_block", "sink_window")


def inputs(dtype, seed=0):
    """Index inputs are small integers, so that block scores tie often and round never."""
    q, k, v = main_inputs(dtype, seed=seed)
    index_q, index_k = index_inputs(dtype, seed=seed, draw=integers)
    return {"q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k}


def edit(x, fn):
    """The inputs after `fn` on each, as a numpy array."""
    return {name: jnp.asarray(fn(np.asarray(array)), array.dtype) for name, array in x.items()}


def results_and_gradients(op, x, **place):
    """Results, and gradients of all inputs for arbitrary cotangents; block ids have none.

    Compiled afresh in every call, since meshes and chunk sizes are no arguments.
    """

    def run(x, place):
        if op in IDS:
            return OPS[op](x, place, {}), {}
        results, pullback = jax.vjp(lambda x: OPS[op](x, place, {}), x)
        cotangents = [jnp.where(jnp.isfinite(r), normal(0, *r.shape), 0) for r in results]
        (gradients,) = pullback(cotangents)
        return results, gradients

    return compiled(run)(x, place)


def assert_same(actual, expected):
    """Equal block ids; numbers up to rounding."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype == jnp.int32:
            np.testing.assert_array_equal(a, e)
        else:
            assert_close(a, e)
