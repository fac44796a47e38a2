"""Selected attention by union tiles: in the interpreter against numpy, and compiled for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.sparse_attention.union_mosaic_gpu import UnionConfig, union

ONE = UnionConfig(consumers=1, key_tile=64, ring=2)
HALVES = UnionConfig(consumers=3, key_tile=64, ring=5)
WHOLE = UnionConfig(consumers=2, key_tile=128, ring=3)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call; `offset` is an int or one per row."""

    config: UnionConfig
    num_queries: int = 8
    num_keys: int = 320
    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 64
    top_k: int = 3
    offset: int | tuple[int, ...] = 0
    batch: int = 1
    dtype: str = "bfloat16"
    scale: float = 0.2


CASES = {
    "a group of 4, padded to 8": Case(ONE, heads=4, num_queries=9, offset=100),
    "a group of 8, a ragged last tile": Case(HALVES, heads=8, num_queries=13, offset=250),
    "a group of 16 in blocks of two parts": Case(HALVES, block_size=128, offset=170, head_dim=128),
    "a group of 64 with two groups": Case(ONE, heads=128, kv_heads=2, num_queries=2, offset=130),
    "whole blocks of 128, ragged keys": Case(WHOLE, block_size=128, num_keys=300, offset=290),
    "an offset per row": Case(ONE, batch=2, num_queries=3, offset=(5, 200)),
    "float16": Case(ONE, num_queries=4, offset=129, dtype="float16"),
    "from the first query": Case(ONE, num_queries=6, num_keys=100),
}


def visible_blocks(case, seed=3):
    """[B, Hkv, T, K]: the own block and random earlier ones with -1 strewn in; query 1 has none.

    The first query of all neighbours picks block 0, a hot one, whenever it may.
    """
    random = np.random.default_rng(seed)
    shape = case.batch, case.kv_heads, case.num_queries, case.top_k
    ids = np.full(shape, -1, np.int32)
    for batch, offset in enumerate(np.broadcast_to(case.offset, (case.batch,))):
        for group, query in np.ndindex(shape[1:3]):
            own = (offset + query) // case.block_size
            picked = [own, *random.permutation(np.arange(own))][: case.top_k]
            if query % 3 == 2:
                picked[0] = -1
            if query == 1:
                picked = []
            ids[batch, group, query, : len(picked)] = picked
    return ids


def inputs(case):
    shapes = ((case.num_queries, case.heads), *((case.num_keys, case.kv_heads),) * 2)
    random = np.random.default_rng(0)
    for length, heads in shapes:
        x = random.normal(size=(case.batch, length, heads, case.head_dim))
        yield jnp.asarray(x, case.dtype)


def assert_as_oracle(case, interpret):
    q, k, v = inputs(case)
    block_ids = visible_blocks(case)
    offset = case.offset if isinstance(case.offset, int) else jnp.asarray(case.offset, jnp.int32)
    with traced_for(Target(interpret)):
        o, lse = union(
            q,
            k,
            v,
            jnp.asarray(block_ids),
            offset,
            block_size=case.block_size,
            scale=case.scale,
            config=case.config,
        )
    mask = numpy_oracle.support(
        case.batch,
        case.kv_heads,
        case.num_queries,
        case.num_keys,
        block_ids,
        case.block_size,
        query_offset=case.offset,
    )
    exact = (np.asarray(x, np.float64) for x in (q, k, v))
    expected_o, expected_lse = numpy_oracle.attention(*exact, mask, case.scale)
    assert o.dtype == q.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(o, np.float64), expected_o, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-4, rtol=2e-4)
    assert np.isneginf(np.asarray(lse)[:, :, 1]).all()
    assert not np.asarray(o)[:, 1].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_log_sum_exp(case):
    assert_as_oracle(case, plgpu.InterpretGPUParams())


def test_no_races():
    case = Case(UnionConfig(consumers=2, key_tile=64, ring=3), offset=200, top_k=2)
    assert_as_oracle(case, plgpu.InterpretGPUParams(detect_races=True))


@pytest.mark.parametrize("group", [1, 8, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_h100_without_spills(group, head_dim):
    def attend(q, k, v, block_ids, offset):
        return union(q, k, v, block_ids, offset, block_size=128, scale=0.1, config=UnionConfig())

    kv = jax.ShapeDtypeStruct((1, 4096, 2, head_dim), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 4096, 2 * group, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 2, 4096, 16), jnp.int32)
    offset = jax.ShapeDtypeStruct((1,), jnp.int32)
    (kernel,) = compile_for_h100(attend, q, kv, kv, ids, offset)
    assert kernel.spill_bytes == 0
