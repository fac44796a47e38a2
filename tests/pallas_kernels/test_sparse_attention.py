"""`sparse_attention`: every implementation against the numpy oracle and dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    HEAD_DIM,
    INPUT_DTYPES,
    LAYOUTS,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KEYS,
    NUM_KV_HEADS,
    ONE_DOCUMENT,
    PACKED,
    TOLERANCES,
    TOP_K,
    arbitrary_blocks,
    assert_close,
    compiled,
    exact,
    finite_difference,
    learned_blocks,
    main_inputs,
    normal,
)

from pallas_kernels import BlockSelection, dense_attention, sparse_attention


@functools.partial(compiled, static_argnames=("implementation", "scale"))
def attend(q, k, v, block_ids, do, dlse, *, query_offset=None, **options):
    """Output, log-sum-exp and the gradients of q, k and v. One compilation serves many tests."""
    selection = BlockSelection(block_ids, BLOCK_SIZE)
    options["query_offset"] = 0 if query_offset is None else query_offset
    (o, lse), pullback = jax.vjp(lambda *qkv: sparse_attention(*qkv, selection, **options), q, k, v)
    return o, lse, *pullback((do.astype(o.dtype), dlse.astype(lse.dtype)))


@compiled
def attend_densely(q, k, v, do, dlse):
    options = {"return_lse": True, "implementation": "reference"}
    (o, lse), pullback = jax.vjp(lambda *qkv: dense_attention(*qkv, **options), q, k, v)
    return o, lse, *pullback((do.astype(o.dtype), dlse.astype(lse.dtype)))


def cotangents(dtype, num_queries=NUM_KEYS):
    do = jnp.asarray(normal(6, BATCH, num_queries, NUM_HEADS, HEAD_DIM), dtype)
    return do, jnp.asarray(normal(7, BATCH, NUM_HEADS, num_queries))


class SparseAttentionTests:
    """Subclass per implementation; `dtypes`, widest first, and `tolerances` are its promise."""

    implementation: str
    dtypes: tuple[str, ...]
    tolerances = TOLERANCES

    def assert_all_close(self, actual, expected):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, self.tolerances)

    def assert_as_oracle(self, results, arguments, mask, scale=None):
        q, k, v, do, dlse = exact(*arguments)
        expected = numpy_oracle.attention(q, k, v, mask, scale)
        gradients = numpy_oracle.attention_gradients(q, k, v, mask, do, dlse, scale)
        self.assert_all_close(results, (*expected, *gradients))

    def assert_case(self, layout, blocks, dtype):
        q, k, v = main_inputs(dtype, layout.num_queries)
        do, dlse = cotangents(dtype, layout.num_queries)
        block_ids = blocks(layout)
        results = attend(
            q, k, v, block_ids, do, dlse, implementation=self.implementation, **layout.arrays()
        )
        self.assert_as_oracle(results, (q, k, v, do, dlse), layout.support(block_ids))
        return results

    @pytest.mark.parametrize("blocks", [learned_blocks, arbitrary_blocks])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_output_log_sum_exp_and_gradients(self, layout, blocks, widest_dtype):
        self.assert_case(layout, blocks, widest_dtype)

    @pytest.mark.parametrize("blocks", [learned_blocks, arbitrary_blocks])
    def test_dtypes(self, blocks, dtype):
        o, lse, *gradients = self.assert_case(PACKED, blocks, dtype)
        assert all(x.dtype == dtype for x in (o, *gradients))
        assert lse.dtype == ("float64" if dtype == "float64" else "float32")

    def test_scale(self, widest_dtype):
        arguments = (*main_inputs(widest_dtype), *cotangents(widest_dtype))
        block_ids = arbitrary_blocks(ONE_DOCUMENT)
        q, k, v, do, dlse = arguments
        results = attend(
            q, k, v, block_ids, do, dlse, scale=0.7, implementation=self.implementation
        )
        self.assert_as_oracle(results, arguments, ONE_DOCUMENT.support(block_ids), scale=0.7)

    @pytest.mark.parametrize("num_kv_heads", [1, NUM_HEADS])
    def test_one_group_and_one_head_per_group(self, num_kv_heads, widest_dtype):
        q, _, _ = main_inputs(widest_dtype)
        do, dlse = cotangents(widest_dtype)
        shape = (BATCH, NUM_KEYS, num_kv_heads, HEAD_DIM)
        k, v = (jnp.asarray(normal(seed, *shape), widest_dtype) for seed in (8, 9))
        two, other_two = arbitrary_blocks(ONE_DOCUMENT), arbitrary_blocks(ONE_DOCUMENT, seed=6)
        block_ids = np.concatenate([two, other_two], axis=1)[:, :num_kv_heads]
        mask = numpy_oracle.support(BATCH, num_kv_heads, NUM_KEYS, NUM_KEYS, block_ids, BLOCK_SIZE)
        results = attend(q, k, v, block_ids, do, dlse, implementation=self.implementation)
        self.assert_as_oracle(results, (q, k, v, do, dlse), mask)

    @pytest.mark.fast
    def test_equals_dense_when_the_blocks_cover_the_context(self, widest_dtype):
        """Output, log-sum-exp and every gradient, with more blocks asked for than there are."""
        q, k, v = main_inputs(widest_dtype)
        do, dlse = cotangents(widest_dtype)
        block_ids = learned_blocks(ONE_DOCUMENT, top_k=NUM_BLOCKS + 3)
        sparse = attend(q, k, v, block_ids, do, dlse, implementation=self.implementation)
        self.assert_all_close(sparse, attend_densely(q, k, v, do, dlse))

    def test_equals_dense_for_every_query_within_the_first_k_blocks(self, dtype):
        """The gradients too, of a loss that reads those queries only."""
        within = TOP_K * BLOCK_SIZE
        q, k, v = main_inputs(dtype)
        do, dlse = cotangents(dtype)
        do, dlse = do.at[:, within:].set(0), dlse.at[..., within:].set(0)
        block_ids = learned_blocks(ONE_DOCUMENT)
        sparse = attend(q, k, v, block_ids, do, dlse, implementation=self.implementation)
        dense = attend_densely(q, k, v, do, dlse)
        assert_close(sparse[0][:, :within], dense[0][:, :within], self.tolerances)
        assert_close(sparse[1][..., :within], dense[1][..., :within], self.tolerances)
        self.assert_all_close(sparse[2:], dense[2:])
        sparse_o, dense_o = exact(sparse[0], dense[0])
        assert np.abs(sparse_o - dense_o)[:, within:].max() > 0.1, "later queries drop blocks"

    @pytest.mark.fast
    def test_nothing_visible_is_zero_with_zero_gradients(self, dtype):
        """Padding queries, and queries whose selection is empty or lies in the future."""
        q, k, v = main_inputs(dtype)
        block_ids = arbitrary_blocks(PACKED)
        block_ids[0, 1, 3] = -1
        block_ids[0, 1, 4] = [3, 4, -1]
        nothing = ~PACKED.support(block_ids).any(-1)
        assert nothing[0, 1, 3:5].all()
        assert nothing[1, :, 57:].all()
        assert not nothing.all()
        o, lse, dq, dk, dv = attend(
            q,
            k,
            v,
            block_ids,
            *cotangents(dtype),
            implementation=self.implementation,
            **PACKED.arrays(),
        )
        per_head = np.repeat(nothing, NUM_HEADS // NUM_KV_HEADS, axis=1)
        rows = np.moveaxis(per_head, 1, 2)
        assert (np.asarray(o)[rows] == 0).all()
        assert (np.asarray(lse)[per_head] == -np.inf).all()
        assert np.isfinite(np.asarray(lse)[~per_head]).all()
        assert (np.asarray(dq)[rows] == 0).all()
        assert (np.asarray(dk)[1, 57:] == 0).all()
        assert (np.asarray(dv)[1, 57:] == 0).all()
        assert all(np.isfinite(x).all() for x in exact(o, dq, dk, dv))

    def test_scores_far_beyond_the_range_of_exp(self, dtype):
        """Log-sum-exps of hundreds; the output is off by the rounding of such a score."""
        q, k, v = main_inputs(dtype)
        q = q * 256
        block_ids = learned_blocks(ONE_DOCUMENT)
        o, lse, *gradients = attend(
            q, k, v, block_ids, *cotangents(dtype), implementation=self.implementation
        )
        expected = numpy_oracle.attention(*exact(q, k, v), ONE_DOCUMENT.support(block_ids))
        assert expected[1].max() > 800
        assert_close(lse, expected[1], self.tolerances)
        scaled = {name: 300 * bound for name, bound in self.tolerances.items()}
        assert_close(o, expected[0], self.tolerances if dtype == "bfloat16" else scaled)
        assert all(np.isfinite(x).all() for x in exact(*gradients))


class TestReference(SparseAttentionTests):
    implementation = "reference"
    dtypes = INPUT_DTYPES

    def test_gradients_are_the_finite_differences_of_the_oracle(self):
        block_ids = arbitrary_blocks(PACKED)
        mask = PACKED.support(block_ids)
        empty = ~np.repeat(mask.any(-1), NUM_HEADS // NUM_KV_HEADS, axis=1)
        with jax.enable_x64(True):
            qkv = main_inputs("float64")
            do, dlse = cotangents("float64")
            _, _, *gradients = attend(
                *qkv, block_ids, do, dlse, implementation="reference", **PACKED.arrays()
            )
            qkv, gradients, (do, dlse) = exact(*qkv), exact(*gradients), exact(do, dlse)

        def loss(*qkv):
            o, lse = numpy_oracle.attention(*qkv, mask)
            return (o * do).sum() + (np.where(empty, 0, lse) * dlse).sum()

        for wrt, gradient in enumerate(gradients):
            for seed in range(3):
                direction = normal(seed, *gradient.shape)
                slope = finite_difference(loss, qkv, wrt, direction)
                np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)
