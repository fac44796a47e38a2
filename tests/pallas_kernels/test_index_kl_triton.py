"""`index_kl` by Triton: interpreted, and assembled for GPUs that are not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from triton_assembler import assemble, spill_bytes
from triton_cases import CASES, Case, assert_close, exact
from triton_interpreter import interpreted

from pallas_kernels import BlockSelection, index_kl
from pallas_kernels.index_kl import gradient_triton
from pallas_kernels.index_kl import triton as index_kl_triton


def align(case, block_ids, weights, q, k, index_q, index_k):
    """The loss, and its terms and log-sum-exps."""
    options = {"weights": jnp.asarray(weights, jnp.float32), "implementation": "triton"}
    selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
    loss, *terms = index_kl(q, k, index_q, index_k, selection, **options, **case.place())
    return loss, terms


def weights_of(case):
    """Any."""
    return case.normal(8, case.groups, case.num_queries)


def assert_as_oracle(case, block_ids):
    q, k, _ = case.main_inputs()
    index_q, index_k = case.index_inputs()
    mask, arguments = case.mask(block_ids), exact(q, k, index_q, index_k)
    seen = mask.any(-1)
    weights = weights_of(case)
    loss = functools.partial(align, case, block_ids, weights)
    with interpreted():
        run = compiled(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
        (dq, dk, *gradients), results = run(q, k, index_q, index_k)
    for actual, wanted in zip(results, numpy_oracle.index_kl(*arguments, mask), strict=True):
        assert_close(actual, wanted, case.dtype)
    assert not np.asarray(results[0])[~seen].any()
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    wanted = numpy_oracle.index_kl_gradients(*arguments, mask, weights)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert actual.dtype == case.dtype
        assert_close(actual, gradient, case.dtype)
    return seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients(case):
    assert not assert_as_oracle(case, case.block_ids()).all()


def test_long_lists_are_cut(monkeypatch):
    """Everybody picks block 0: its list has several slices."""
    monkeypatch.setattr(gradient_triton, "QUERIES_PER_SLICE", 5)
    case = Case(num_queries=12, query_offset=33)
    block_ids = np.tile(np.array([0, 2], np.int32), (1, 1, 12, 1))
    assert_as_oracle(case, block_ids)


def test_log_sum_exp_of_the_main_scores_may_be_given():
    """It is taken as it is: one that is too large by log 2 halves the teacher."""
    case = Case(num_queries=8, query_offset=37)
    block_ids = np.tile(np.array([0, 2], np.int32), (1, 1, 8, 1))
    q, k, v = case.main_inputs()
    index_q, index_k = case.index_inputs()
    _, lse = numpy_oracle.attention(*exact(q, k, v), case.mask(block_ids))
    call = functools.partial(
        index_kl_triton.index_kl,
        *(q, k, index_q, index_k, jnp.asarray(block_ids), None, case.query_offset),
        block_size=case.block_size,
        scale=case.head_dim**-0.5,
        index_scale=case.index_dim**-0.5,
    )
    with interpreted():
        computed, _ = call(None)
        given, _ = call(jnp.asarray(lse, jnp.float32))
        halved, index_lse = call(jnp.asarray(lse + np.log(2), jnp.float32))
    np.testing.assert_allclose(given, computed, atol=1e-5)
    half = (np.asarray(computed) - np.log(2) + np.asarray(index_lse)) / 2
    np.testing.assert_allclose(halved, half, atol=1e-5)


def test_refuses_the_whole_causal_prefix():
    case = Case()
    q, k, _ = case.main_inputs()
    with interpreted(), pytest.raises(NotImplementedError, match="there is no selection"):
        index_kl(q, k, *case.index_inputs(), implementation="triton", **case.place())


@pytest.mark.parametrize("capability", [80, 90])
def test_assembles_without_spills(capability):
    def gradients(q, k, index_q, index_k, block_ids):
        def loss(index_q, index_k):
            selection = BlockSelection(block_ids, 128)
            return index_kl(q, k, index_q, index_k, selection, implementation="triton").loss

        return jax.grad(loss, (0, 1))(index_q, index_k)

    reports = assemble(
        capability,
        gradients,
        jax.ShapeDtypeStruct((1, 4096, 64, 128), "bfloat16"),
        jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16"),
        jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16"),
        jax.ShapeDtypeStruct((1, 4096, 128), "bfloat16"),
        jax.ShapeDtypeStruct((1, 4, 4096, 16), "int32"),
    )
    assert {"divergence_kernel", "index_key_gradient_kernel"} < set(reports)
    assert not any(spill_bytes(report) for report in reports.values())
