"""`sparse_attention` on a TPU: interpreted on a CPU, and compiled for every chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import compiled
from tpu_cases import CASES, interpreted, interpreted_strictly
from triton_cases import assert_close, exact

from pallas_kernels import BlockSelection, sparse_attention
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.mosaic_tpu import CHIPS


def attend(case, block_ids, q, k, v):
    selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
    return sparse_attention(q, k, v, selection, implementation="mosaic_tpu", **case.place())


def assert_as_oracle(case, block_ids):
    q, k, v = case.main_inputs()
    results = compiled(functools.partial(attend, case))(block_ids, q, k, v)
    for actual, wanted in zip(
        results, numpy_oracle.attention(*exact(q, k, v), case.mask(block_ids)), strict=True
    ):
        assert_close(actual, wanted, case.dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results(case):
    with interpreted():
        assert_as_oracle(case, case.block_ids())


@pytest.mark.parametrize("name", ["bfloat16", "documents with padding behind them"])
def test_without_races_and_in_memory_of_nan(name):
    with interpreted_strictly():
        assert_as_oracle(CASES[name], CASES[name].block_ids())


def test_pages_anywhere_in_the_pool():
    """What no page of a row holds may be NaN; a block without a page counts as not selected."""
    case = CASES["decoding"]
    q, k, v = case.main_inputs()
    table = np.array([[7, 2, -1], [0, 5, 3]])
    block_ids = np.empty((2, 2, 1, 2), np.int32)
    block_ids[0], block_ids[1] = [0, 2], [0, 1]
    has_page = block_ids < np.array([2, 3])[:, None, None, None]

    def pages(array):
        padded = jnp.pad(array, ((0, 0), (0, 42), (0, 0), (0, 0)))
        blocks = padded.reshape(2, 3, 64, *array.shape[2:]).swapaxes(2, 3)
        pool = jnp.full((9, *blocks.shape[2:]), jnp.nan, array.dtype)
        used = table >= 0
        return pool.at[table[used]].set(blocks[used])

    def decode(q, k, v, block_ids, **pages):
        selection = BlockSelection(jnp.asarray(block_ids), case.block_size)
        return sparse_attention(q, k, v, selection, implementation="mosaic_tpu", **pages)

    place = {"query_offset": case.place()["query_offset"]}
    with interpreted():
        expected = compiled(functools.partial(decode, **place))(
            q, k, v, np.where(has_page, block_ids, -1)
        )
        actual = compiled(functools.partial(decode, **place, page_table=jnp.asarray(table)))(
            q, pages(k), pages(v), block_ids
        )
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
    q = jax.ShapeDtypeStruct((1, 4096, 64, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16")
    block_ids = jax.ShapeDtypeStruct((1, 4, 4096, 16), "int32")

    def attend(q, k, v, block_ids):
        return sparse_attention(q, k, v, BlockSelection(block_ids, 128))

    text = compile_for_tpu(attend, q, k, k, block_ids, chip=chip).as_text()
    assert "sparse_attention_forward" in text
