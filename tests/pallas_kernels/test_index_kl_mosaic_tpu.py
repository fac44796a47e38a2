"""`index_kl` on a TPU: interpreted on a CPU, and compiled for every chip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from test_index_kl_triton import cotangents, expected_gradients
from tpu_cases import CASES, SMALL, changed, interpreted, interpreted_strictly
from triton_cases import assert_close, exact

from pallas_kernels import BlockSelection, index_kl
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.index_kl import mosaic_tpu
from pallas_kernels.index_kl.tiles_mosaic_tpu import IndexKLConfig
from pallas_kernels.mosaic_tpu import CHIPS

# Documents that start inside a block, as they may without a selection.
PREFIX_CASES = {
    "from the first query": changed(per_group=4, query_offset=0, num_queries=50, num_keys=50),
    "an offset per batch row": changed(groups=2, batch=2, num_queries=9, query_offset=(4, 130)),
    "documents with padding behind them": changed(
        num_queries=300,
        num_keys=300,
        query_offset=0,
        documents=((0, 150), (170, 200), (200, 290)),
        index_dim=128,
    ),
    "bfloat16": changed(dtype="bfloat16"),
}


def align(case, block_ids, main_lse, q, k, index_q, index_k):
    selection = None
    if block_ids is not None:
        selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
    return tuple(
        index_kl(
            *(q, k, index_q, index_k, selection),
            main_lse=main_lse,
            implementation="mosaic_tpu",
            **case.place(),
        )
    )


def assert_as_oracle(case, block_ids, *, lse_given=False):
    q, k, v = case.main_inputs()
    index_q, index_k = case.index_inputs()
    mask, arguments = case.mask(block_ids), exact(q, k, index_q, index_k)
    seen = mask.any(-1)
    d_kl, d_index_lse = cotangents(case, seen)
    main_lse = None
    if lse_given:
        main_lse = jnp.asarray(numpy_oracle.attention(*exact(q, k, v), mask)[1], jnp.float32)

    def run(inputs, main_lse, cotangents):
        results, pullback = jax.vjp(functools.partial(align, case, block_ids, main_lse), *inputs)
        return results, pullback(cotangents)

    results, (dq, dk, *gradients) = compiled(run)(
        (q, k, index_q, index_k),
        main_lse,
        (jnp.asarray(d_kl, jnp.float32), jnp.asarray(d_index_lse, jnp.float32)),
    )
    for actual, wanted in zip(results, numpy_oracle.index_kl(*arguments, mask), strict=True):
        # Nothing is rounded on the way to the results.
        assert_close(actual, wanted, "float32")
    assert not np.asarray(results[0])[~seen].any()
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    wanted = expected_gradients(case, mask, arguments, d_kl, d_index_lse)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert actual.dtype == case.dtype
        assert_close(actual, gradient, case.dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case):
    with interpreted():
        assert_as_oracle(case, case.block_ids())


@pytest.mark.parametrize("case", PREFIX_CASES.values(), ids=PREFIX_CASES)
def test_value_and_gradients_of_the_causal_prefix(case):
    with interpreted():
        assert_as_oracle(case, None)


@pytest.mark.parametrize("prefix", [False, True])
def test_log_sum_exp_of_the_main_scores_may_be_given(prefix):
    case = PREFIX_CASES["an offset per batch row"]
    with interpreted():
        assert_as_oracle(case, None if prefix else case.block_ids(), lse_given=True)
