"""`sparse_attention` on a TPU: interpreted on a CPU, and compiled for every chip."""

import functools

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
    q = jax.ShapeDtypeStruct((1, 4096, 64, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 4096, 4, 128), "bfloat16")
    block_ids = jax.ShapeDtypeStruct((1, 4, 4096, 16), "int32")

    def attend(q, k, v, block_ids):
        return sparse_attention(q, k, v, BlockSelection(block_ids, 128))

    text = compile_for_tpu(attend, q, k, k, block_ids, chip=chip).as_text()
    assert "sparse_attention_forward" in text
