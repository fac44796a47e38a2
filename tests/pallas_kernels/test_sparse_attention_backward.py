"""Gradients of `sparse_attention` on Hopper: interpreted, and compiled ahead for an H100."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from attention_cases import BACKWARD, Case, interpreted
from jax.experimental.pallas import mosaic_gpu as plgpu
from op_cases import compiled

from pallas_kernels.ahead_of_time import compile_for_h100, lower_for_h100
from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.sparse_attention.add_parts_mosaic_gpu import add_parts
from pallas_kernels.sparse_attention.backward import BackwardConfig, backward, backward_chunks
from pallas_kernels.sparse_attention.backward_mosaic_gpu import (
    TILE_ROWS,
    GradientConfig,
    block_gradients,
)
from pallas_kernels.sparse_attention.chunks_mosaic_gpu import chunk_lists
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig, combine
from pallas_kernels.sparse_attention.mosaic_gpu import sparse_attention
from pallas_kernels.sparse_attention.reverse_index import NUM_FIELDS, ReverseIndex
from pallas_kernels.sparse_attention.union_mosaic_gpu import padded_group
from pallas_kernels.visibility import visible_block_ids

# Rows of 64 queries of one group, one per chunk.
CHUNKS = dataclasses.replace(BACKWARD, queries_per_chunk=64, partial_bytes=1)


def cotangents(case, seed=2):
    rng = np.random.default_rng(seed)
    heads = case.per_group * case.groups
    do = rng.normal(size=(case.batch, case.num_queries, heads, case.head_dim))
    dlse = rng.normal(size=(case.batch, heads, case.num_queries))
    return jnp.asarray(do, case.dtype), jnp.asarray(dlse, jnp.float32)


def differentiate(case, arrays, block_ids, results, cotangents):
    """The kernels' gradients, from an output and log-sum-exp of somebody else."""
    with interpreted():
        return compiled(gradients(case, block_ids))(*arrays, *results, *cotangents)


def gradients(case, block_ids):
    """The kernels as a function of arrays, results and cotangents."""
    segments, offset = case.segment_ids(), case.query_offset
    offset = offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32)
    segments = None if segments is None else jnp.asarray(segments)
    visible = visible_block_ids(jnp.asarray(block_ids), segments, offset, case.block_size)
    shape = {"block_size": case.block_size, "config": case.backward}

    def differentiate(q, k, v, o, lse, do, dlse):
        return by_lists(q, k, v, visible, offset, (o, lse), (do, dlse), **shape)

    return differentiate


def by_lists(q, k, v, block_ids, offset, results, cotangents, *, block_size, config):
    """`backward` with the lists that its forward pass would have left."""
    groups, num_blocks = k.shape[2], -(-k.shape[1] // block_size)
    chunks = backward_chunks(config, q, groups, block_ids.shape[3], num_blocks)
    blocks = {"num_blocks": num_blocks, "block_size": block_size}
    per_tile = TILE_ROWS // padded_group(q.shape[2] // groups)
    lists = chunk_lists(block_ids, offset, chunks, queries_per_tile=per_tile, **blocks)
    options = {"block_size": block_size, "scale": 0.2, "chunks": chunks, "config": config}
    return backward(q, k, v, lists, results, cotangents, **options)


def exact(case, arrays, block_ids, cotangents):
    """Results as the forward pass returns them, and exact gradients."""
    o, lse = case.expected(*arrays, block_ids)
    results = jnp.asarray(o, case.dtype), jnp.asarray(lse, jnp.float32)
    double = (np.asarray(x, np.float64) for x in (*arrays, case.mask(block_ids), *cotangents))
    q, k, v, mask, do, dlse = double
    return results, numpy_oracle.attention_gradients(q, k, v, mask > 0, do, dlse, 0.2)


def assert_close(case, actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == case.dtype
        a = np.asarray(a, np.float64)
        assert np.linalg.norm(a - e) < 0.008 * np.linalg.norm(e)
        np.testing.assert_allclose(a, e, atol=0.02 * np.abs(e).max())


CASES = {
    "groups of 16, from the first query": Case(query_offset=0, num_keys=64, density=0.5),
    "one head per group, two batch rows with offsets": Case(
        1, batch=2, query_offset=(17, 128), density=0.2
    ),
    "groups of 4, padded to 8; ragged queries and keys; chunks": Case(
        4,
        groups=2,
        num_queries=71,
        num_keys=170,
        query_offset=99,
        top_k=3,
        density=0.2,
        backward=CHUNKS,
    ),
    "groups of 32, wide heads and blocks, float16": Case(
        32,
        head_dim=128,
        block_size=128,
        num_keys=256,
        query_offset=130,
        dtype="float16",
        density=0.15,
    ),
    "two batch rows with offsets, chunks of both groups": Case(
        8,
        groups=2,
        batch=2,
        num_queries=100,
        num_keys=256,
        query_offset=(20, 150),
        density=0.4,
        backward=dataclasses.replace(BACKWARD, queries_per_chunk=64),
    ),
    "documents with padding behind them": Case(
        8, num_keys=256, query_offset=70, documents=((0, 64), (64, 90), (128, 250)), top_k=4
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case):
    arrays, block_ids, given = tuple(case.inputs()), case.block_ids(), cotangents(case)
    results, expected = exact(case, arrays, block_ids, given)
    assert_close(case, differentiate(case, arrays, block_ids, results, given), expected)


def test_all_queries_pick_one_block_and_no_races(capfd):
    """Its list is cut into slices, whose sums are added in order: the same bits twice.

    Query 0 stands where the last tile has nobody, and must not count there.
    """
    case = Case(8, block_size=128, num_keys=256, query_offset=128, top_k=1)
    arrays, given = tuple(case.inputs()), cotangents(case)
    block_ids = np.full((1, 1, case.num_queries, case.top_k), -1, np.int32)
    block_ids[:, :, 0, 0] = 1
    block_ids[:, :, 6:, 0] = 1
    results, expected = exact(case, arrays, block_ids, given)
    with interpreted(races=True):
        call = compiled(gradients(case, block_ids))
        actual, again = (call(*arrays, *results, *given) for _ in range(2))
    assert_close(case, actual, expected)
    assert "RACE" not in capfd.readouterr().out
    for first, second in zip(actual, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_without_any_block_gradients_are_zero():
    case = Case(8, top_k=1)
    arrays, given = tuple(case.inputs()), cotangents(case)
    block_ids = np.full((1, 1, case.num_queries, case.top_k), -1, np.int32)
    results, _ = exact(case, arrays, block_ids, given)
    for array in differentiate(case, arrays, block_ids, results, given):
        np.testing.assert_array_equal(array, 0)


def test_what_is_not_a_number_stays_with_the_blocks_that_its_query_picked():
    """Query 0 also stands where nobody is in the reverse index."""
    case = Case(8, top_k=1)
    arrays, given = tuple(case.inputs()), cotangents(case)
    block_ids = np.full((1, 1, case.num_queries, case.top_k), -1, np.int32)
    block_ids[:, :, 0, 0] = 0
    block_ids[:, :, 1:12, 0] = 1
    arrays, given = ((array.at[:, 0].set(jnp.nan), *others) for array, *others in (arrays, given))
    results, _ = exact(case, arrays, block_ids, given)
    dq, dk, dv = differentiate(case, arrays, block_ids, results, given)
    for array, own in ((dq, 1), (dk, case.block_size), (dv, case.block_size)):
        assert jnp.isnan(array[:, :own]).any()
        assert jnp.isfinite(array[:, own:]).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(per_group=8, density=0.2, num_keys=128, query_offset=(64,)),
        Case(
            per_group=8,
            groups=2,
            batch=2,
            num_queries=100,
            query_offset=(20, 90),
            density=0.3,
            backward=CHUNKS,
        ),
    ],
    ids=["one chunk", "chunks of one group, two batch rows"],
)
def test_gradients_of_the_op(case):
    """Forward and backward kernels together, by the same lists, through the op's own derivative."""
    arrays, block_ids, given = tuple(case.inputs()), case.block_ids(), cotangents(case)

    def pull_back(q, k, v, block_ids, do, dlse):
        results, pullback = jax.vjp(lambda *qkv: case.attend(*qkv, block_ids), q, k, v)
        return results, pullback((do, dlse))

    with interpreted():
        (o, lse), actual = compiled(pull_back)(*arrays, block_ids, *given)
    results, expected = exact(case, arrays, block_ids, given)
    assert_close(case, [o], [np.asarray(results[0], np.float64)])
    np.testing.assert_allclose(lse, results[1], atol=1e-3)
    assert_close(case, actual, expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GradientConfig(num_query_slots=1), "num_query_slots=1 must be at least 2"),
        (lambda: GradientConfig(tiles_per_slice=0), "tiles_per_slice=0 must be at least 1"),
        (lambda: GradientConfig(num_query_slots=4).check(128, 128), "bytes of shared memory"),
        (lambda: BackwardConfig(partial_bytes=0), "partial_bytes=0 must be positive"),
        (lambda: BackwardConfig(queries_per_chunk=96), "must be a power of two from 64 on"),
    ],
)
def test_configs_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("per_group", "head_dim", "block_size", "dtype"),
    [(g, 128, 128, "bfloat16") for g in (8, 16, 32, 64)]
    + [(16, 64, 64, "bfloat16"), (16, 128, 64, "bfloat16"), (16, 64, 128, "bfloat16")]
    + [(16, 128, 128, "float16")],
)
def test_gradient_kernel_compiles_without_spills(per_group, head_dim, block_size, dtype):
    def differentiate(q, k, statistics, queries, slices, num_slices):
        index = ReverseIndex(queries, queries, slices, num_slices)
        sums = [jax.new_ref(jnp.zeros(k.shape, jnp.float32)) for _ in range(2)]
        config = GradientConfig()
        shape = {"block_size": block_size, "scale": 0.1, "config": config}
        parts = block_gradients(q, q, k, k, statistics, index, *sums, **shape)
        return parts, [jax.freeze(ref) for ref in sums]

    shapes = [((2048, 4 * per_group, head_dim), dtype), ((2048, 4, head_dim), dtype)]
    shapes += [((64 * per_group, 2, 64), "float32"), ((4096,), "int32")]
    shapes += [((512, NUM_FIELDS), "int32"), ((1,), "int32")]
    (kernel,) = compile_for_h100(differentiate, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert kernel.spill_bytes == 0


def test_a_million_tokens_fit_into_the_grids(monkeypatch):
    """Of a grid's axes the GPU takes the last one up to 2^31, others up to 65,535."""
    grids, kernel = {}, plgpu.kernel

    def recorded(*args, grid, kernel_name, **options):
        grids[kernel_name] = grid
        return kernel(*args, grid=grid, kernel_name=kernel_name, **options)

    monkeypatch.setattr(plgpu, "kernel", recorded)
    options = {"block_size": 64, "config": BackwardConfig()}
    q, kv = (jax.ShapeDtypeStruct((1, 2**20, heads, 64), jnp.bfloat16) for heads in (64, 8))
    block_ids = jax.ShapeDtypeStruct((1, 8, 2**20, 16), jnp.int32)
    lse = jax.ShapeDtypeStruct((1, 64, 2**20), jnp.float32)
    with traced_for(Target()):
        jax.eval_shape(
            lambda q, kv, ids, lse: by_lists(q, kv, kv, ids, 0, (q, lse), (q, lse), **options),
            *(q, kv, block_ids, lse),
        )
    assert set(grids) == {"block_gradients", "add_parts", "combine"}
    assert all(size <= 65_535 for grid in grids.values() for size in grid[:-1])


def test_sums_of_parts_compile_without_spills():
    def add(parts, slices, partial, places, weights):
        dk, dv = (jax.new_ref(jnp.zeros((2048, 4, 128), jnp.float32)) for _ in range(2))
        add_parts(parts, slices, dk, dv)
        dq = jax.empty_ref(jax.ShapeDtypeStruct((2048, 64, 128), jnp.bfloat16))
        start, config = jnp.int32(0), CombineConfig()
        combine(partial, places, weights, dq, start, config=config, normalized=False)
        return [jax.freeze(ref) for ref in (dq, dk, dv)]

    tiles = 1, 4, 512, 16
    shapes = [((8, 2, 128, 128), "float32"), ((32, NUM_FIELDS), "int32")]
    shapes += [((4096, 16, 128), "bfloat16"), ((*tiles, 4), "int32"), ((*tiles, 64), "float32")]
    kernels = compile_for_h100(add, *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert len(kernels) == 2
    assert not any(kernel.spill_bytes for kernel in kernels)


def test_sums_of_keys_and_values_are_two_arrays_where_layers_are_sliced_from_a_stack():
    """XLA draws the slices into the kernel's call, and merges operands there that are equal."""
    layers, queries, heads, groups, head_dim, top_k = 2, 256, 16, 2, 64, 4
    stack = (layers, 1, queries)
    q = jax.ShapeDtypeStruct((*stack, heads, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((*stack, groups, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, groups, queries, top_k), jnp.int32)

    def total(q, k, v, block_ids):
        def layer(total, arrays):
            o, _ = sparse_attention(*arrays, block_ids, None, 0, block_size=64, scale=0.2)
            return total + o.astype(jnp.float32).sum(), None

        return jax.lax.scan(layer, 0.0, (q, k, v))[0]

    lowered = lower_for_h100(jax.grad(total, argnums=(0, 1, 2)), q, k, k, ids)
    in_place = []
    for line in lowered.compile().as_text().splitlines():
        if aliases := re.search(r"output_to_operand_aliasing=\{(.*?\)\}?)\}", line):
            (operands,) = re.findall(r"custom-call\((.*?)\)", line)
            names = re.findall(r"%[\w.#-]+", operands)
            in_place.append([names[int(n)] for n in re.findall(r"\((\d+),", aliases[1])])
    assert sorted(map(len, in_place)) == [1, 1, 2, 2]  # `combine` twice, both that add to dK and dV
    assert all(len(set(names)) == len(names) for names in in_place)
