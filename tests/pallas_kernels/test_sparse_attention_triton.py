"""`sparse_attention` by Triton: interpreted, and assembled for GPUs that are not there."""

import dataclasses
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

import pallas_kernels.triton
from pallas_kernels import BlockSelection, sparse_attention
from pallas_kernels.sparse_attention import backward_triton
from pallas_kernels.sparse_attention.block_lists import block_lists


def attend(case, block_ids, q, k, v):
    selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
    return sparse_attention(q, k, v, selection, implementation="triton", **case.place())


def results_and_gradients(case, block_ids, arrays, cotangents):
    def run(arrays, cotangents):
        results, pullback = jax.vjp(functools.partial(attend, case, block_ids), *arrays)
        dtypes = [result.dtype for result in results]
        return results, pullback(tuple(map(jnp.asarray, cotangents, dtypes)))

    with interpreted():
        return compiled(run)(arrays, cotangents)


def assert_as_oracle(case, block_ids):
    q, k, v = case.main_inputs()
    mask = case.mask(block_ids)
    expected = numpy_oracle.attention(*exact(q, k, v), mask)
    # The oracle has gradients of visible rows only: nothing is to come from the others.
    do = jnp.asarray(case.normal(6, *q.shape[1:]), case.dtype)
    dlse = np.where(np.isfinite(expected[1]), case.normal(7, q.shape[2], q.shape[1]), 0)
    results, gradients = results_and_gradients(
        case, block_ids, (q, k, v), (do, jnp.asarray(dlse, jnp.float32))
    )
    for actual, wanted in zip(results, expected, strict=True):
        assert_close(actual, wanted, case.dtype)
    nothing = np.isneginf(expected[1]).swapaxes(1, 2)
    assert not np.asarray(results[0])[nothing].any()
    wanted = numpy_oracle.attention_gradients(*exact(q, k, v), mask, *exact(do), dlse)
    for actual, gradient in zip(gradients, wanted, strict=True):
        assert actual.dtype == case.dtype
        assert_close(actual, gradient, case.dtype)
    return nothing


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients(case):
    assert assert_as_oracle(case, case.block_ids()).any()


def test_long_lists_are_cut_and_blocks_taken_in_parts(monkeypatch):
    """Everybody picks block 0: its list has several slices, each of several query tiles."""
    case = Case(num_queries=24, num_keys=64, block_size=32, query_offset=40)
    monkeypatch.setattr(backward_triton, "QUERIES_PER_SLICE", 10)
    monkeypatch.setattr(backward_triton, "QUERY_TILE", 4)
    monkeypatch.setattr(pallas_kernels.triton, "TILE_BYTES", 1024)
    block_ids = case.block_ids()
    block_ids[..., 0] = 0
    block_ids[..., 1] = np.where(block_ids[..., 1] == 0, -1, block_ids[..., 1])
    assert_as_oracle(case, block_ids)


def test_a_repeated_id_counts_once():
    case = Case(num_queries=5, query_offset=40)
    assert_as_oracle(case, np.full((1, 1, 5, 2), 1, np.int32))


def test_key_that_nobody_selected_may_be_nan():
    case = Case(num_queries=5, query_offset=40)
    q, k, v = case.main_inputs()
    k, v = (x.at[:, :16].set(jnp.nan) for x in (k, v))
    block_ids = np.full((1, 1, 5, 2), -1, np.int32)
    block_ids[..., 0] = 1
    cotangents = jnp.ones_like(q), jnp.ones((1, 2, 5))
    results, gradients = results_and_gradients(case, block_ids, (q, k, v), cotangents)
    assert all(np.isfinite(x).all() for x in (*results, *gradients))


def test_block_lists():
    """Each query once under each of its blocks, ascending, in slices of at most three."""
    case = Case(groups=2, batch=2, num_queries=20, top_k=3)
    block_ids, num_blocks = case.block_ids(), 3
    lists = block_lists(jnp.asarray(block_ids), num_blocks, queries_per_slice=3)
    queries, slices, first_slices = (np.asarray(x) for x in lists)
    for owner in range(2 * 2 * num_blocks):
        picked = (block_ids == owner % num_blocks).any(-1).reshape(-1, 20)[owner // num_blocks]
        mine = slices[first_slices[owner] : first_slices[owner + 1]]
        assert (mine[:, 0] == owner).all()
        assert (mine[:, 2] - mine[:, 1] <= 3).all()
        entries = [query for _, start, stop in mine for query in queries[start:stop]]
        assert entries == np.flatnonzero(picked).tolist()
    unused = slices[first_slices[-1] :]
    assert (unused[:, 1] == unused[:, 2]).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"block_size": 8}, "block_size=8"),
        ({"head_dim": 272}, "272 dims"),
        ({"per_group": 129}, "not 129"),
    ],
)
def test_refusals(change, reason, double_precision):
    case = dataclasses.replace(Case(), **change)
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        attend(case, case.block_ids(), *case.main_inputs())


def test_refuses_where_there_is_no_gpu():
    case = Case()
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU, this is 'cpu'"):
        attend(case, case.block_ids(), *case.main_inputs())


@pytest.mark.parametrize("capability", [80, 90])
def test_assembles_without_spills(capability):
    case = Case(16, 4, head_dim=128, block_size=128, top_k=16, dtype="bfloat16")
    q = jax.ShapeDtypeStruct((1, 4096, 64, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16")
    block_ids = jax.ShapeDtypeStruct((1, 4, 4096, 16), "int32")

    def gradients(q, k, v, block_ids):
        def loss(q, k, v):
            o, _ = sparse_attention(
                q, k, v, BlockSelection(block_ids, case.block_size), implementation="triton"
            )
            return o.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    reports = assemble(capability, gradients, q, k, k, block_ids)
    assert sorted(reports) == [
        "add_slices_kernel",
        "forward_kernel",
        "key_value_gradient_kernel",
        "query_gradient_kernel",
    ]
    assert not any(spill_bytes(report) for report in reports.values())
