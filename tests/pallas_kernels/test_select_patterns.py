"""`select_pattern` and `main_block_mass`: each pattern by the definition in its docstring."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    HEAD_DIM,
    LAYOUTS,
    NUM_KEYS,
    NUM_KV_HEADS,
    ONE_DOCUMENT,
    PACKED,
    TOP_K,
    assert_close,
    compiled,
    exact,
    main_inputs,
)

from pallas_kernels import main_block_mass, select_pattern
from pallas_kernels.select_blocks import patterns

# Shapes alone matter to the patterns: one token per block makes long contexts cheap.
LONG, LONG_TOP_K = 96, 6


@functools.partial(
    compiled, static_argnames=("pattern", "top_k", "num_local_blocks", "num_sink_blocks", "scale")
)
def select(pattern, q, k, *, top_k=TOP_K, query_offset=None, **options):
    options["query_offset"] = 0 if query_offset is None else query_offset
    return select_pattern(pattern, q, k, block_size=BLOCK_SIZE, top_k=top_k, **options).block_ids


@functools.partial(compiled, static_argnames=("pattern", "num_sink_blocks"))
def select_of_long(pattern, num_sink_blocks=0):
    q = jnp.zeros((1, LONG, NUM_KV_HEADS, 1))
    return select_pattern(
        pattern, q, q, block_size=1, top_k=LONG_TOP_K, num_sink_blocks=num_sink_blocks
    ).block_ids


def expected_mass(q, k, layout):
    return numpy_oracle.main_block_mass(*exact(q, k), BLOCK_SIZE, **layout.arguments())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_main_block_mass(layout, double_precision):
    q, k, _ = main_inputs("float64", layout.num_queries)
    measure = compiled(functools.partial(main_block_mass, block_size=BLOCK_SIZE))
    expected = expected_mass(q, k, layout)
    assert_close(measure(q, k, **layout.arrays()), expected)
    rows = expected.sum(-1)
    np.testing.assert_allclose(rows[rows > 0], 1)
    assert (rows == 0).any() == (layout is not ONE_DOCUMENT)


def test_sink_window_keeps_the_nearest_blocks():
    for t, ids in enumerate(select_of_long("sink_window")[0, 0].tolist()):
        nearest = [b for b in range(t - LONG_TOP_K + 1, t + 1) if b >= 0]
        assert ids == nearest + [-1] * (LONG_TOP_K - len(nearest))


def strides(own, top_k):
    """The first block of each of `top_k` equal strides over blocks 0 to own."""
    length = (own + 1) / top_k
    return {math.ceil(stride * length) for stride in range(top_k)} & set(range(own + 1))


def test_strided_spreads_the_blocks_evenly_over_the_past():
    for t, ids in enumerate(select_of_long("strided")[0, 0].tolist()):
        if t < LONG_TOP_K:
            assert ids[: t + 1] == list(range(t + 1))
            continue
        leaders = strides(t, LONG_TOP_K)
        # The own block is forced; without being a leader it takes the farthest one's place.
        expected = sorted(leaders - {t})[-(LONG_TOP_K - 1) :]
        assert ids == [*expected, t]
        gaps = np.diff(ids)
        assert gaps.max() <= math.ceil((t + 1) / LONG_TOP_K)
        assert ids[0] <= 2 * (t + 1) / LONG_TOP_K


@pytest.mark.fast
def test_random_draws_per_query_and_group_and_the_same_in_every_call():
    ids = np.asarray(select_of_long("random"))[0]
    np.testing.assert_array_equal(ids, np.asarray(select_of_long("random"))[0])
    late = ids[:, LONG // 2 :]
    assert (late[0] != late[1]).any(-1).mean() > 0.9, "groups draw alike"
    sets = {tuple(row[:-1]) for group in late for row in group}
    assert len(sets) > 0.9 * late.shape[0] * late.shape[1], "queries draw alike"


def test_random_per_block_draws_once_for_the_queries_of_a_block():
    block, num_groups = 4, 3
    q = jnp.zeros((1, 4 * LONG, num_groups, 1))
    sizes = {"block_size": block, "top_k": LONG_TOP_K, "num_local_blocks": 2, "num_sink_blocks": 1}

    def draw(pattern):
        ids = compiled(lambda q: select_pattern(pattern, q, q, **sizes).block_ids)(q)
        return np.asarray(ids).reshape(num_groups, LONG, block, LONG_TOP_K)

    ids = draw("random_per_block")
    assert (ids == ids[:, :, :1]).all()
    assert (draw("random") != ids).any(-1).mean() > 0.5
    late = ids[:, LONG // 2 :, 0]
    assert (late[:, :, [0, -2, -1]] == [[0, n - 1, n] for n in range(LONG // 2, LONG)]).all()
    free = late[:, :, 1:-2]
    assert (np.diff(free) > 0).all()
    assert len({tuple(row) for row in free.reshape(-1, 3)}) > 0.9 * free[..., 0].size
    assert (free[0] != free[1]).any(-1).mean() > 0.9, "groups draw alike"
    # A model that was trained with these blocks must find them again.
    assert free[:, -1].tolist() == [[65, 79, 91], [38, 56, 59], [31, 60, 69]]


@pytest.mark.parametrize("pattern", ["random", "random_per_block"])
def test_random_draws_uniformly_from_the_past(pattern):
    ids = np.asarray(select_of_long(pattern))[0]
    place = np.concatenate(
        [ids[r, t, :-1] / t for r in range(NUM_KV_HEADS) for t in range(LONG // 4, LONG)]
    )
    quarters = np.histogram(place, bins=4, range=(0, 1))[0] / len(place)
    # 720 draws: a quarter's share has a standard deviation of 0.016.
    np.testing.assert_allclose(quarters, 0.25, atol=0.05)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_oracle_keeps_the_blocks_with_the_most_attention(layout, double_precision):
    q, k, _ = main_inputs("float64", layout.num_queries)
    ids = np.asarray(select("oracle", q, k, **layout.arrays()))
    expected = expected_mass(q, k, layout)
    for b, offset in enumerate(numpy_oracle.offsets(layout.query_offset, BATCH)):
        segments = None if layout.segment_ids is None else layout.segment_ids[b]
        for r in range(NUM_KV_HEADS):
            for t in range(layout.num_queries):
                forced = numpy_oracle.forced_blocks(offset + t, segments, BLOCK_SIZE, 1, 0)
                seen = range(min(forced, default=0) + 1)
                scores = {n: expected[b, r, t, n] for n in seen if expected[b, r, t, n] > 0}
                wanted = numpy_oracle.top_blocks(scores, forced, TOP_K)
                assert ids[b, r, t].tolist() == wanted


def test_scale_of_the_main_scores(double_precision):
    """A flatter softmax spreads the mass; equal blocks then tie, and the lower id wins."""
    q, k, _ = main_inputs("float64")
    measure = compiled(functools.partial(main_block_mass, block_size=BLOCK_SIZE, scale=0.1))
    assert_close(measure(q, k), expected_mass(q * 0.1 * HEAD_DIM**0.5, k, ONE_DOCUMENT))
    ids = select("oracle", q, k, scale=0.0)
    assert ids[0, 0, -1].tolist() == [0, 1, 7]


def test_oracle_of_nan_attention_keeps_the_forced_blocks():
    q, k, _ = main_inputs("float32")
    ids = np.asarray(select("oracle", q * jnp.nan, k, num_sink_blocks=1))
    assert ids[0, 0, -1].tolist() == [0, 7, -1]


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_forced_blocks_and_padding_are_as_of_select_blocks(pattern):
    q, k, _ = main_inputs("float32")
    ids = np.asarray(
        select(pattern, q, k, num_local_blocks=2, num_sink_blocks=1, **PACKED.arrays())
    )
    for b, r, t in np.ndindex(BATCH, NUM_KV_HEADS, NUM_KEYS):
        forced = numpy_oracle.forced_blocks(t, PACKED.segment_ids[b], BLOCK_SIZE, 2, 1)
        valid = set(ids[b, r, t].tolist()) - {-1}
        if PACKED.segment_ids[b, t] == 0:
            assert not valid
            continue
        first = int(np.argmax(PACKED.segment_ids[b] == PACKED.segment_ids[b, t])) // BLOCK_SIZE
        assert forced <= valid <= set(range(first, t // BLOCK_SIZE + 1))
        assert len(valid) == min(TOP_K, t // BLOCK_SIZE + 1 - first)


def test_sinks_count_inside_k():
    ids = np.asarray(select_of_long("sink_window", num_sink_blocks=2))[0, 0, -1]
    assert ids.tolist() == [0, 1, *range(LONG - LONG_TOP_K + 2, LONG)]
