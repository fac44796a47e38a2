"""Selected attention by union tiles: in the interpreter against numpy, and compiled for an H100."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.sparse_attention.union_mosaic_gpu import UnionConfig, union

ONE = UnionConfig(num_consumers=1, key_tile=64, ring=2)
HALVES = UnionConfig(num_consumers=3, key_tile=64, ring=5)
WHOLE = UnionConfig(num_consumers=2, key_tile=128, ring=3)


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
    "a list of two rows": Case(ONE, num_queries=5, num_keys=2560, offset=2550, top_k=30),
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


def test_no_races(capfd):
    case = Case(UnionConfig(num_consumers=2, key_tile=64, ring=3), offset=200, top_k=2)
    assert_as_oracle(case, plgpu.InterpretGPUParams(detect_races=True))
    assert "RACE" not in capfd.readouterr().out


def arguments(group=16, head_dim=128, dtype="bfloat16", length=4096):
    """Shapes of q, k, v, block_ids and query_offset for 4096 tokens and two groups."""
    kv = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
    q = jax.ShapeDtypeStruct((1, length, 2 * group, head_dim), dtype)
    ids = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.int32)
    return q, kv, kv, ids, jax.ShapeDtypeStruct((1,), jnp.int32)


def attend(*arrays, config, block_size=128, scale=0.1):
    return union(*arrays, block_size=block_size, scale=scale, config=config)


# Wide heads and blocks take most registers.
@pytest.mark.parametrize(
    ("group", "head_dim", "block_size"),
    [(group, 128, 128) for group in (1, 16, 32, 64)] + [(16, 64, 64), (16, 64, 128), (16, 128, 64)],
)
def test_compiles_for_h100_without_spills(group, head_dim, block_size):
    config = UnionConfig.for_block(block_size, head_dim)
    shipped = functools.partial(attend, config=config, block_size=block_size)
    (kernel,) = compile_for_h100(shipped, *arguments(group, head_dim))
    assert kernel.spill_bytes == 0


def test_lists_longer_than_one_copy_may_be_compile_for_h100():
    """24 queries a tile with 16 blocks each, of 512: a list of 384, and a copy takes 256."""
    config = UnionConfig.for_block(64, 64)
    shipped = functools.partial(attend, config=config, block_size=64)
    (kernel,) = compile_for_h100(shipped, *arguments(4, 64, length=2**15))
    assert kernel.spill_bytes == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16 or float16 inputs"),
        ({"head_dim": 96}, "head_dim 64 or 128, not 96"),
        ({"group": 65}, "at most 64 query heads per KV head, not 65"),
        ({"block_size": 96}, "block_size=96 to be a multiple of key_tile=128"),
        ({"scale": 0.0}, "a positive scale"),
        ({"config": UnionConfig(ring=12)}, "choose a smaller ring"),
    ],
)
def test_what_it_does_not_serve(changes, reason):
    options = {"config": UnionConfig()}
    options |= {
        key: changes.pop(key) for key in ("config", "block_size", "scale") if key in changes
    }
    with traced_for(Target()), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(attend, **options), *arguments(**changes))


@pytest.mark.parametrize("field", [{"num_consumers": 4}, {"key_tile": 96}, {"ring": 1}])
def test_a_form_that_cannot_be(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}={field[name]} must"):
        UnionConfig(**field)
