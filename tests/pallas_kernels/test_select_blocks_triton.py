"""`select_blocks` by Triton: interpreted, and assembled for GPUs that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from triton_assembler import assemble, spill_bytes
from triton_cases import DOCUMENTS, Case
from triton_interpreter import interpreted

import pallas_kernels.triton
from pallas_kernels import select_blocks
from pallas_kernels.select_blocks import select_triton

# One tile of queries and a list as long as the chunks of blocks are.
CASE = Case(groups=2, num_queries=30, num_keys=150, query_offset=117, top_k=3)


def integers(case, dtype="float32", seed=0):
    """Small integers in four of the features: scores are exact in every dtype and often tie."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (case.batch, case.num_queries, case.groups, case.index_dim))
    keys = rng.integers(-2, 3, (case.batch, case.num_keys, case.index_dim))
    for array in (queries, keys):
        array[..., 4:] = 0
    return jnp.asarray(queries, dtype), jnp.asarray(keys, dtype)


def select(case, index_q, index_k, **options):
    def run(index_q, index_k):
        return select_blocks(
            index_q,
            index_k,
            block_size=case.block_size,
            top_k=case.top_k,
            implementation="triton",
            **case.place(),
            **options,
        )

    with interpreted():
        return np.asarray(compiled(run)(index_q, index_k).block_ids)


def assert_as_oracle(case, index_q, index_k, **options):
    expected = numpy_oracle.select_blocks(
        np.asarray(index_q, np.float64),
        np.asarray(index_k, np.float64),
        block_size=case.block_size,
        top_k=case.top_k,
        segment_ids=case.segment_ids(),
        query_offset=case.query_offset,
        **options,
    )
    np.testing.assert_array_equal(select(case, index_q, index_k, **options), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ties_go_to_the_lower_id(dtype):
    assert_as_oracle(CASE, *integers(CASE, dtype))


@pytest.mark.parametrize("pooling", ["lse", "mean"])
def test_poolings_of_blocks_in_parts(pooling, monkeypatch):
    """A block is pooled from the parts that its tile of keys takes."""
    monkeypatch.setattr(pallas_kernels.triton, "TILE_BYTES", 1024)
    case = Case(groups=2, num_queries=20, num_keys=320, query_offset=300, block_size=32, top_k=4)
    index_q, index_k = case.index_inputs()
    assert_as_oracle(case, index_q, index_k, pooling=pooling)


def test_maximum_of_blocks_in_parts_and_several_tiles_of_queries(monkeypatch):
    monkeypatch.setattr(pallas_kernels.triton, "TILE_BYTES", 1024)
    monkeypatch.setattr(select_triton, "QUERY_TILE", 16)
    case = Case(num_queries=40, num_keys=320, query_offset=260, block_size=32, top_k=4)
    assert_as_oracle(case, *integers(case), num_sink_blocks=1, num_local_blocks=2)


def test_documents_offsets_and_forced_blocks():
    case = Case(
        groups=2, batch=2, num_queries=30, num_keys=45, query_offset=(0, 15), documents=DOCUMENTS
    )
    index_q, index_k = integers(case)
    assert_as_oracle(case, index_q, index_k, num_sink_blocks=1)


def test_fewer_blocks_than_asked_for():
    case = Case(num_queries=30, num_keys=40, query_offset=10, top_k=5)
    assert_as_oracle(case, *integers(case))


def test_dims_that_are_no_power_of_two_and_negative_scale():
    case = Case(num_queries=20, num_keys=150, query_offset=130, index_dim=20, top_k=3)
    assert_as_oracle(case, *case.index_inputs(), scale=-0.5)


@pytest.mark.parametrize("pooling", ["max", "lse", "mean"])
def test_not_a_number_is_worst_and_infinity_does_not_force(pooling):
    """Scores of past blocks: NaN in one token of block 1, +inf in one of 2, -inf in all of 4."""
    case = CASE
    index_q = jnp.zeros((1, 30, 2, 16)).at[..., 0].set(1.0)
    keys = np.zeros((1, 150, 16), np.float32)
    keys[0, :, 0] = -3 - np.arange(150) // 16
    keys[0, 20, 0] = np.nan
    keys[0, 40, 0] = np.inf
    keys[0, 64:80, 0] = -np.inf
    for sinks in (0, 2):
        options = {"pooling": pooling, "num_sink_blocks": sinks}
        with np.errstate(invalid="ignore"):
            assert_as_oracle(case, index_q, jnp.asarray(keys), **options)


def test_minus_zero_equals_zero():
    """Scores that vanish: -0 in block 5, +0 in block 6, less in the others."""
    case = Case(num_queries=20, num_keys=150, query_offset=130, top_k=2)
    index_q = jnp.zeros((1, 20, 1, 16)).at[..., 0].set(1.0)
    keys = np.zeros((1, 150, 16), np.float32)
    keys[0, :, 0] = 3
    keys[0, 80:96, 0], keys[0, 96:112, 0] = 1e-30, -1e-30
    block_ids = select(case, index_q, jnp.asarray(keys), scale=-1e-30)
    assert (block_ids[..., 0] == 5).all()


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"index_precision": "int8"}, {}, "index_precision='int8'"),
        ({}, {"top_k": 65}, "top_k=65"),
        ({}, {"num_queries": 15}, "15 queries"),
        ({}, {"block_size": 48}, "block_size=48"),
    ],
)
def test_refusals(options, change, reason):
    case = Case(**{"num_keys": 96, "query_offset": 0} | change)
    with pytest.raises(NotImplementedError, match=reason):
        select(case, *integers(case), **options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pooling", ["max", "lse"])
def test_assembles_without_spills(capability, pooling):
    def select_ids(index_q, index_k):
        return select_blocks(index_q, index_k, pooling=pooling, implementation="triton").block_ids

    index_q = jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16")
    index_k = jax.ShapeDtypeStruct((1, 4096, 128), "bfloat16")
    reports = assemble(capability, select_ids, index_q, index_k)
    assert list(reports) == ["select_kernel"]
    assert not spill_bytes(reports["select_kernel"])
