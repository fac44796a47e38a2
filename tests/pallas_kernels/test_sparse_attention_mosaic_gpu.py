"""`sparse_attention` on Hopper by KV-outer: interpreted, and compiled ahead for an H100."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CHUNKS, SINGLE, Case, interpreted, run
from op_cases import compiled

from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.mosaic_gpu import SHARED_MEMORY_BYTES
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig, combine
from pallas_kernels.sparse_attention.kv_outer import KVOuterConfig, by_tiles
from pallas_kernels.sparse_attention.kv_outer_mosaic_gpu import (
    AttentionConfig,
    default_config,
    partial_attention,
)
from pallas_kernels.sparse_attention.mosaic_gpu import SCHEMES, SparseAttentionConfig
from pallas_kernels.sparse_attention.reverse_index import NUM_FIELDS, ReverseIndex
from pallas_kernels.visibility import visible_block_ids


def assert_close(actual, expected):
    """The output within the rounding of partial results, the log-sum-exp of float32 scores."""
    (o, lse), (expected_o, expected_lse) = actual, expected
    np.testing.assert_allclose(np.asarray(o, np.float64), expected_o, atol=0.02, rtol=0.01)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-5)


CASES = {
    "groups of 16, from the first query": Case(groups=2, query_offset=0, num_keys=64),
    "one head per group, one of everything": Case(1, config=SINGLE),
    "groups of 3, padded to 8; ragged queries and keys": Case(
        3, groups=2, num_queries=71, num_keys=170, query_offset=99
    ),
    "groups of 64": Case(64, density=0.1, num_keys=128, query_offset=64),
    "groups of 32, wide heads and blocks, float16": Case(
        32, head_dim=128, block_size=128, num_keys=256, dtype="float16", density=0.2
    ),
    "an offset per batch row": Case(batch=2, query_offset=(17, 128), density=0.3),
    "documents with padding behind them": Case(
        num_keys=256, query_offset=70, documents=((0, 64), (64, 90), (128, 250)), top_k=4
    ),
    "documents by union tiles": Case(
        num_keys=256, query_offset=70, documents=((0, 64), (64, 90), (128, 250)), scheme="union"
    ),
    "two chunks of two batch rows": Case(
        2,
        batch=2,
        num_queries=100,
        num_keys=128,
        query_offset=28,
        top_k=3,
        density=0.25,
        config=CHUNKS,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_log_sum_exp(case):
    arrays, block_ids = tuple(case.inputs()), case.block_ids()
    o, lse = run(case, *arrays, block_ids)
    assert (o.dtype, lse.dtype) == (case.dtype, "float32")
    expected = case.expected(*arrays, block_ids)
    assert_close((o, lse), expected)
    nothing = np.isneginf(expected[1]).swapaxes(1, 2)
    assert nothing.any()
    assert not np.asarray(o)[nothing].any()


def test_all_queries_pick_one_block_and_no_races(capfd):
    case = Case(num_keys=128, query_offset=64)
    arrays = tuple(case.inputs())
    block_ids = np.full((1, 1, case.num_queries, case.top_k), -1, np.int32)
    block_ids[:, :, 5:, 0] = 1
    assert_close(run(case, *arrays, block_ids, races=True), case.expected(*arrays, block_ids))
    # The interpreter remembers the races of the last kernel only, but prints those of each.
    assert "RACE" not in capfd.readouterr().out


def test_every_query_picks_another_block_and_a_repeated_id_counts_once():
    case = Case(num_keys=64 * 70, query_offset=64 * 69, num_queries=64)
    arrays = tuple(case.inputs())
    block_ids = np.repeat(np.arange(64, dtype=np.int32)[None, None, :, None], 2, axis=3)
    assert_close(run(case, *arrays, block_ids), case.expected(*arrays, block_ids))


def test_not_a_number_stays_with_the_queries_that_see_it():
    """In a key of block 0; what is picked of it is NaN, what is not stays finite."""
    case = Case(density=0.5, num_keys=128, query_offset=64, top_k=1)
    (q, k, v), block_ids = case.inputs(), case.block_ids()
    k = k.at[0, 3].set(jnp.nan)
    o, lse = (np.asarray(x, np.float32) for x in run(case, q, k, v, block_ids))
    sees = (block_ids == 0).any(-1)[0, 0]
    assert 0 < sees.sum() < len(sees)
    assert np.isnan(o[0, sees]).all()
    assert np.isnan(lse[0][:, sees]).all()
    assert not np.isnan(o[0, ~sees]).any()


@pytest.mark.parametrize("scheme", ["union", "kv_outer"])
def test_the_cheaper_scheme_runs(scheme, monkeypatch):
    """Union tiles where neighbours agree, KV-outer where they share nothing.

    Both are marks here: what they compute is tested by itself.
    """
    for mark, name in enumerate(SCHEMES[1:]):

        def attend(q, k, v, block_ids, query_offset, *_, mark=mark, **__):
            lse = (block_ids.sum(-1) + query_offset + mark / 4).astype(jnp.float32)
            return q, jnp.repeat(lse, q.shape[2] // k.shape[2], axis=1)

        monkeypatch.setattr(mosaic_gpu, name, attend)
    case = Case(num_keys=64 * 70, query_offset=64 * 69, scheme="auto")
    ids = np.zeros((1, 1, 64, 1), np.int32)
    if scheme == "kv_outer":
        ids += np.arange(64, dtype=np.int32)[:, None]
    _, lse = run(case, *case.inputs(), ids)
    expected = ids.sum(-1) + case.query_offset + SCHEMES[1:].index(scheme) / 4
    np.testing.assert_array_equal(lse, np.repeat(expected, 16, axis=1))


@pytest.mark.parametrize("num_queries", [100, 256])
def test_union_ratio_is_that_of_the_sampled_neighbours(num_queries):
    """Four neighbours with two blocks each: 2 to 8 distinct ones. Of 256 queries 4 are sampled."""
    rng = np.random.default_rng(0)
    block_ids = np.sort(rng.integers(0, 9, (2, 2, num_queries, 3)), -1).astype(np.int32)
    block_ids[..., 1:][block_ids[..., 1:] == block_ids[..., :-1]] = -1
    runs = block_ids[:, :, : num_queries // 4 * 4].reshape(2, 2, -1, 4, 3)
    runs = runs[:, :, 8::16] if num_queries == 256 else runs[:, :, 8:9]
    distinct = [len(set(run.ravel()) - {-1}) for run in runs.reshape(-1, 12)]
    blocks = (runs >= 0).sum(-1).mean()
    ratio = mosaic_gpu.union_ratio(jnp.asarray(block_ids), 4)
    np.testing.assert_allclose(ratio, np.mean(distinct) / blocks, rtol=1e-6)


def test_without_any_block_there_is_no_overlap_to_divide_by():
    assert mosaic_gpu.union_ratio(jnp.full((1, 1, 64, 2), -1), 4) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "all in bfloat16 or all in float16"),
        ({"head_dim": 32}, "head_dim of 64 or 128, not 32"),
        ({"block_size": 32}, "block_size of 64 or 128, not 32"),
        ({"top_k": 65}, "1 to 64 blocks per query, not 65"),
        ({"per_group": 65}, "at most 64 query heads per KV head, not 65"),
        ({"num_queries": 63}, "63 queries are decoding"),
    ],
)
def test_refusals(change, reason):
    case = dataclasses.replace(Case(), **change)
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(case.attend, *case.inputs(), case.block_ids())


def test_refuses_a_scale_that_turns_the_order_and_other_devices():
    case = Case()
    (q, k, v), ids = case.inputs(), jnp.asarray(case.block_ids())
    attend = functools.partial(mosaic_gpu.sparse_attention, block_size=64)
    with interpreted(), pytest.raises(NotImplementedError, match="a positive scale, not -1"):
        attend(q, k, v, ids, None, 0, scale=-1.0)
    with pytest.raises(NotImplementedError, match="need an NVIDIA Hopper GPU"):
        attend(q, k, v, ids, None, 0, scale=1.0)


def test_visible_block_ids_are_the_picks_that_see_something():
    case = CASES["documents with padding behind them"]
    block_ids = case.block_ids()
    block_ids[0, 0, 0] = [1, 1, 2, 2]
    segments = jnp.asarray(case.segment_ids())
    actual = visible_block_ids(jnp.asarray(block_ids), segments, 70, 64)
    kept = np.asarray(actual) >= 0
    seen = case.mask(block_ids).reshape(1, 1, case.num_queries, -1, 64).any(-1)
    repeated = np.zeros_like(kept)
    repeated[..., 1:] = block_ids[..., 1:] == block_ids[..., :-1]
    expected = np.take_along_axis(seen, np.maximum(block_ids, 0), -1) & (block_ids >= 0)
    np.testing.assert_array_equal(kept, expected & ~repeated)
    assert kept.any()
    assert not kept[block_ids >= 0].all()


def test_log_sum_exps_far_apart_are_combined():
    """Of 4 queries, one without any slot; places of nobody hold NaN, the first too."""
    rng = np.random.default_rng(0)
    places = 1 + rng.permutation(15)[:12].reshape(1, 1, 4, 3)
    places[:, :, 1:, 0] = -1
    places[:, :, 2] = -1
    partial = np.full((16, 16, 64), np.nan)
    lse = np.full((16, 16), np.nan)
    used = places[places >= 0]
    partial[used] = rng.normal(size=(len(used), 16, 64))
    partial = partial.astype(jnp.bfloat16)
    lse[used] = rng.normal(size=(len(used), 16)) * 500
    lse = lse.astype(np.float32)

    def merge(partial, places, lse):
        o = jax.empty_ref(jax.ShapeDtypeStruct((4, 16, 64), jnp.bfloat16))
        tiles, slots = by_tiles(places, lse)
        config = CombineConfig(num_consumers=1, num_thread_blocks=1)
        return combine(partial, tiles, slots, o, jnp.int32(0), config=config), jax.freeze(o)

    with interpreted():
        total, o = compiled(merge)(partial, jnp.asarray(places, jnp.int32), lse)
    for query, slots in enumerate(places[0, 0]):
        slots = slots[slots >= 0]
        expected = np.logaddexp2.reduce(lse[slots].astype(np.float64), axis=0, initial=-np.inf)
        rows = np.asarray(total).reshape(4, 16)[query]
        np.testing.assert_allclose(rows, expected * np.log(2), rtol=1e-5)
        weights = np.exp2(lse[slots] - expected)[..., None]
        exact = (weights * partial[slots].astype(np.float64)).sum(0)
        np.testing.assert_allclose(np.asarray(o, np.float64)[query], exact, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionConfig(num_consumers=4), "num_consumers=4 must be 1 to 3"),
        (lambda: AttentionConfig(num_query_slots=1), "num_query_slots=1 must be at least 2"),
        (lambda: AttentionConfig(num_kv_stages=0), "num_kv_stages=0 must be at least 1"),
        (lambda: AttentionConfig(num_query_slots=3).check(128, 128), "bytes of shared memory"),
        (lambda: CombineConfig(num_consumers=3), "num_consumers=3 must be 1 or 2"),
        (lambda: CombineConfig(num_slots=0), "num_slots=0 must be at least 1"),
        (lambda: CombineConfig().fitted(512, 64), "no room for two tiles"),
        (lambda: SparseAttentionConfig("auto_"), "choose one of auto, union, kv_outer"),
        (lambda: KVOuterConfig(queries_per_row=100), "must be a power of two from 64 on"),
        (lambda: KVOuterConfig(partial_bytes=0), "partial_bytes=0 must be positive"),
    ],
)
def test_configs_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_configs_stay_within_registers_and_shared_memory():
    assert CombineConfig().fitted(128, 64).num_slots < CombineConfig().num_slots
    for per_group in (8, 16, 32, 64):
        config = default_config(per_group)
        config.check(128, 128)
        assert config.shared_memory_bytes(128, 128) > SHARED_MEMORY_BYTES // 2


# Wide heads and blocks take most registers.
WIDE = [(g, 128, 128) for g in (8, 16, 32, 64)]
NARROW = [(16, 64, 64), (16, 128, 64), (16, 64, 128)]


@pytest.mark.parametrize(
    ("per_group", "head_dim", "block_size", "dtype"),
    [(*shape, "bfloat16") for shape in WIDE + NARROW] + [(*shape, "float16") for shape in WIDE],
)
def test_attention_compiles_without_spills(per_group, head_dim, block_size, dtype):
    def attend(q, k, v, queries, slices, num_slices):
        return partial_attention(
            q,
            k,
            v,
            ReverseIndex(queries, queries, slices, num_slices),
            block_size=block_size,
            scale=0.1,
            config=default_config(per_group),
        )

    keys = (2048, 4, head_dim), dtype
    shapes = [((2048, 4 * per_group, head_dim), dtype), keys, keys]
    shapes += [((4096,), "int32"), ((512, NUM_FIELDS), "int32"), ((1,), "int32")]
    assert spill_bytes(attend, shapes) == 0


@pytest.mark.parametrize(
    ("per_group", "head_dim", "top_k", "dtype"),
    [(g, 128, 16, "bfloat16") for g in (8, 16, 32, 64)]
    + [(g, 64, 3, "bfloat16") for g in (8, 16)]
    + [(16, 128, 64, "float16")],
)
def test_combine_compiles_without_spills(per_group, head_dim, top_k, dtype):
    def merge(partial, places, slots, first_query):
        o = jax.empty_ref(jax.ShapeDtypeStruct((2 * 8192, 4 * per_group, head_dim), dtype))
        lse = combine(partial, places, slots, o, first_query, config=CombineConfig())
        return lse, jax.freeze(o)

    tiles = 2, 4, 128, top_k
    shapes = [
        ((4096, per_group, head_dim), dtype),
        ((*tiles, 64 // per_group), "int32"),
        ((*tiles, 64), "float32"),
        ((), "int32"),
    ]
    assert spill_bytes(merge, shapes) == 0


def spill_bytes(fn, shapes):
    """Of the single kernel in `fn`."""
    (resources,) = compile_for_h100(fn, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return resources.spill_bytes


def test_both_schemes_of_a_default_call_compile_for_h100():
    """64 query heads in 4 groups, 128 dims, 16 blocks of 128, in chunks of KV-outer's results."""
    q, kv = (jax.ShapeDtypeStruct((1, 2**13, heads, 128), jnp.bfloat16) for heads in (64, 4))
    ids = jax.ShapeDtypeStruct((1, 4, 2**13, 16), jnp.int32)
    attend = functools.partial(
        mosaic_gpu.sparse_attention,
        segment_ids=None,
        query_offset=0,
        block_size=128,
        scale=0.1,
        config=SparseAttentionConfig(kv_outer=KVOuterConfig(partial_bytes=2**30)),
    )
    kernels = compile_for_h100(lambda *arrays: attend(*arrays), q, kv, kv, ids)
    assert len(kernels) == 3
    assert not any(kernel.spill_bytes for kernel in kernels)
