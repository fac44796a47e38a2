"""`select_blocks`: every implementation against the numpy oracle, and the order it promises."""

import functools

import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    INDEX_DIM,
    INPUT_DTYPES,
    LAYOUTS,
    NUM_BLOCKS,
    NUM_KEYS,
    NUM_KV_HEADS,
    ONE_DOCUMENT,
    PACKED,
    TOP_K,
    compiled,
    exact,
    index_inputs,
    integers,
    normal,
    properties,
)

from pallas_kernels import select_blocks

POOLINGS = ("max", "lse", "mean")
SEEDS = st.integers(0, 2**32 - 1)


@functools.partial(
    compiled,
    static_argnames=(
        "implementation",
        "top_k",
        "num_local_blocks",
        "num_sink_blocks",
        "pooling",
        "scale",
    ),
)
def select(index_q, index_k, *, top_k=TOP_K, query_offset=None, **options):
    options["query_offset"] = 0 if query_offset is None else query_offset
    return select_blocks(index_q, index_k, block_size=BLOCK_SIZE, top_k=top_k, **options).block_ids


class SelectBlocksTests:
    """Subclass per implementation; `dtypes`, widest first, say what it promises.

    Most inputs are small integers: their scores are exact in every dtype, ties included, so that
    the block ids must be equal.
    """

    implementation: str
    dtypes: tuple[str, ...]

    def select(self, index_q, index_k, **options):
        ids = select(index_q, index_k, implementation=self.implementation, **options)
        return np.asarray(ids)

    def blocks_of_slot_36(self, index_q, index_k, dtype, **options):
        """What a query in the middle of block 4 selects. NaN in all later keys must not matter."""
        queries = np.broadcast_to(index_q, (BATCH, NUM_KEYS, NUM_KV_HEADS, INDEX_DIM))
        keys = np.where(np.arange(NUM_KEYS)[:, None] > 36, np.nan, index_k)
        keys = np.broadcast_to(keys, (BATCH, NUM_KEYS, INDEX_DIM))
        ids = self.select(jnp.asarray(queries, dtype), jnp.asarray(keys, dtype), **options)
        return ids[0, 0, 36].tolist()

    def assert_as_oracle(self, arguments, layout=ONE_DOCUMENT, **options):
        actual = self.select(*arguments, **options, **layout.arrays())
        expected = numpy_oracle.select_blocks(
            *exact(*arguments),
            **{"block_size": BLOCK_SIZE, "top_k": TOP_K} | options,
            **layout.arguments(),
        )
        np.testing.assert_array_equal(actual, expected)
        return actual

    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    @pytest.mark.parametrize("draw", [integers, normal])
    def test_block_ids(self, draw, layout, dtype):
        self.assert_as_oracle(index_inputs(dtype, layout.num_queries, draw=draw), layout)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_pooling(self, pooling, widest_dtype):
        draw = normal if pooling == "lse" else integers
        actual = self.assert_as_oracle(
            index_inputs(widest_dtype, draw=draw), PACKED, pooling=pooling
        )
        assert actual.dtype == np.int32

    def test_poolings_differ(self, widest_dtype):
        """Block 0 has the highest token, block 1 most middling ones, block 2 the best mean."""
        scores = np.zeros((NUM_KEYS, INDEX_DIM))
        scores[:8, 0] = [3, -9, -9, -9, -9, -9, -9, -9]
        scores[8:16, 0] = [2.5, 2.5, 2.5, 2.5, 2.5, 2.5, -9, -9]
        scores[16:24, 0] = 1.5
        scores[24:32, 0] = -1
        query = np.array([1.0, 0, 0, 0])
        for pooling, best in zip(POOLINGS, (0, 1, 2), strict=True):
            options = {"dtype": widest_dtype, "pooling": pooling, "scale": 1.0, "top_k": 2}
            assert self.blocks_of_slot_36(query, scores, **options) == [best, 4]

    @pytest.mark.parametrize(
        ("num_local_blocks", "num_sink_blocks"), [(2, 0), (1, 1), (2, 1), (1, 2)]
    )
    def test_forced_blocks(self, num_local_blocks, num_sink_blocks, widest_dtype):
        ids = self.assert_as_oracle(
            index_inputs(widest_dtype, draw=integers),
            PACKED,
            num_local_blocks=num_local_blocks,
            num_sink_blocks=num_sink_blocks,
        )
        np.testing.assert_array_equal(ids[0, :, 27:32], -1)  # padding is forced nothing

    @pytest.mark.parametrize("top_k", [1, NUM_BLOCKS, NUM_BLOCKS + 3])
    def test_number_of_blocks(self, top_k, widest_dtype):
        ids = self.assert_as_oracle(index_inputs(widest_dtype, draw=integers), top_k=top_k)
        own = np.broadcast_to(np.arange(NUM_KEYS) // BLOCK_SIZE, ids.shape[:3])
        np.testing.assert_array_equal((ids >= 0).sum(-1), np.minimum(own + 1, top_k))
        np.testing.assert_array_equal(ids.max(-1), own)

    @pytest.mark.fast
    def test_first_queries_take_everything_visible(self, widest_dtype):
        """Fewer than K blocks, in the first of them: attention is exactly dense there."""
        ids = self.select(*index_inputs(widest_dtype))
        for query in range(TOP_K * BLOCK_SIZE):
            own = query // BLOCK_SIZE
            expected = [*range(own + 1), *[-1] * (TOP_K - own - 1)]
            assert (ids[:, :, query] == expected).all()

    @pytest.mark.fast
    def test_ties_go_to_the_lower_block(self, dtype):
        equal = np.ones((NUM_KEYS, INDEX_DIM))
        assert self.blocks_of_slot_36(np.ones(INDEX_DIM), equal, dtype=dtype) == [0, 1, 4]
        equal[:8] = 0
        assert self.blocks_of_slot_36(np.ones(INDEX_DIM), equal, dtype=dtype) == [1, 2, 4]

    @pytest.mark.fast
    def test_negative_zero_ties_with_zero(self, dtype):
        """A score that underflows from below: -0 in block 0, +0 in the others."""
        tiny = float(jnp.finfo(dtype).tiny)
        keys = np.zeros((NUM_KEYS, INDEX_DIM))
        keys[:8, 0] = -tiny
        ids = self.blocks_of_slot_36(np.ones(INDEX_DIM), keys, dtype=dtype, scale=tiny)
        assert ids == [0, 1, 4]

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_a_block_with_a_nan_token_counts_as_the_lowest(self, pooling, widest_dtype):
        keys = np.ones((NUM_KEYS, INDEX_DIM))
        keys[:8] = np.nan  # all of block 0
        keys[8:16] = 5
        keys[10] = np.nan  # one token of the block that is best without it
        keys[34] = np.nan  # the own block, which is forced
        query, options = np.ones(INDEX_DIM), {"dtype": widest_dtype, "pooling": pooling}
        expected = [2, 3, 4, -1, -1]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=5) == expected
        assert self.blocks_of_slot_36(query, keys, **options, top_k=2) == [2, 4]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=3, num_sink_blocks=1) == [
            0,
            2,
            4,
        ]
        assert self.blocks_of_slot_36(query * np.nan, keys, **options, top_k=2) == [4, -1]

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_overflow_is_the_highest_but_not_forced(self, pooling, widest_dtype):
        huge = float(jnp.finfo(widest_dtype).max) ** 0.75
        keys = np.ones((NUM_KEYS, INDEX_DIM))
        keys[[17, 25], 0] = huge  # +inf in blocks 2 and 3
        keys[8:16, 0] = -huge  # -inf all over block 1
        query = np.array([huge, 0, 0, 0])
        options = {"dtype": widest_dtype, "pooling": pooling}
        assert self.blocks_of_slot_36(query, keys, **options, top_k=2) == [2, 4]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=2, num_sink_blocks=1) == [0, 4]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=3, num_sink_blocks=1) == [
            0,
            2,
            4,
        ]
        assert self.blocks_of_slot_36(query, keys, **options, top_k=5) == [0, 2, 3, 4, -1]

    @pytest.mark.fast
    def test_groups_select_independently(self, widest_dtype):
        """Each group finds its own best past block; a maximum over the groups would share them."""
        keys = np.zeros((BATCH, NUM_KEYS, INDEX_DIM))
        keys[:, :8, 0] = 1  # block 0 is the first group's
        keys[:, 16:24, 1] = 2  # block 2 the second's
        queries = np.zeros((BATCH, NUM_KEYS, NUM_KV_HEADS, INDEX_DIM))
        queries[:, :, 0, 0] = queries[:, :, 1, 1] = 1
        ids = self.select(
            jnp.asarray(queries, widest_dtype), jnp.asarray(keys, widest_dtype), top_k=2
        )
        assert ids[0, :, -1].tolist() == [[0, 7], [2, 7]]

    def test_the_scale_changes_what_log_sum_exp_pooling_prefers(self, widest_dtype):
        keys = np.zeros((NUM_KEYS, INDEX_DIM))
        keys[0, 0] = 3  # one high token in block 0
        keys[8:16, 0] = 2  # eight lower ones in block 1
        query = np.array([1.0, 0, 0, 0])
        options = {"dtype": widest_dtype, "pooling": "lse", "top_k": 2}
        assert self.blocks_of_slot_36(query, keys, **options, scale=1.0) == [1, 4]
        assert self.blocks_of_slot_36(query, keys, **options, scale=10.0) == [0, 4]
        assert self.blocks_of_slot_36(query, keys, **options) == [1, 4]

    @properties
    @given(seed=SEEDS)
    def test_ids_are_unique_ascending_complete_and_hold_the_forced_blocks(self, seed):
        arguments = index_inputs("float32", seed=seed % 1000, draw=integers)
        ids = self.select(*arguments, num_sink_blocks=1, **PACKED.arrays())
        documents = PACKED.segment_ids
        for b, r, t in np.ndindex(ids.shape[:3]):
            valid = ids[b, r, t][ids[b, r, t] >= 0]
            assert (ids[b, r, t][len(valid) :] == -1).all()
            assert (np.diff(valid) > 0).all()
            if documents[b, t] == 0:
                assert len(valid) == 0
                continue
            first = np.argmax(documents[b] == documents[b, t]) // BLOCK_SIZE
            own = t // BLOCK_SIZE
            assert len(valid) == min(TOP_K, own - first + 1)
            assert valid[0] == first
            assert valid[-1] == own

    @properties
    @given(seed=SEEDS)
    def test_the_order_of_tokens_within_past_blocks_is_irrelevant(self, seed):
        index_q, index_k = index_inputs("float32", draw=integers)
        order = np.arange(NUM_KEYS)
        rng = np.random.default_rng(seed)
        for start in range(0, NUM_KEYS - BLOCK_SIZE, BLOCK_SIZE):
            rng.shuffle(order[start : start + BLOCK_SIZE])
        expected = self.select(index_q, index_k)
        actual = self.select(index_q, jnp.asarray(np.asarray(index_k)[:, order]))
        np.testing.assert_array_equal(actual, expected)

    @properties
    @given(seed=SEEDS)
    def test_permuting_groups_rows_and_features_permutes_the_selection(self, seed):
        rng = np.random.default_rng(seed)
        rows, groups, features = (rng.permutation(n) for n in (BATCH, NUM_KV_HEADS, INDEX_DIM))
        index_q, index_k = exact(*index_inputs("float32", draw=integers))
        actual = self.select(
            jnp.asarray(index_q[rows][:, :, groups][..., features], "float32"),
            jnp.asarray(index_k[rows][..., features], "float32"),
        )
        expected = self.select(jnp.asarray(index_q, "float32"), jnp.asarray(index_k, "float32"))
        np.testing.assert_array_equal(actual, expected[rows][:, groups])


class TestReference(SelectBlocksTests):
    implementation = "reference"
    dtypes = INPUT_DTYPES
