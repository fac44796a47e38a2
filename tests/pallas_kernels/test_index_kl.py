"""`index_kl`: every implementation against the numpy oracle, value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
import pytest
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    INPUT_DTYPES,
    KL_TOLERANCES,
    LAYOUTS,
    NUM_KEYS,
    NUM_KV_HEADS,
    ONE_DOCUMENT,
    PACKED,
    arbitrary_blocks,
    assert_close,
    compiled,
    exact,
    finite_difference,
    index_inputs,
    learned_blocks,
    main_inputs,
    normal,
)

from pallas_kernels import BlockSelection, index_kl


@functools.partial(compiled, static_argnames=("implementation", "scale", "index_scale"))
def align(q, k, index_q, index_k, block_ids, kl_weights, *, query_offset=None, **options):
    """KL, student's log-sum-exp, and the gradients of sum(kl * kl_weights) in all four inputs."""
    selection = None if block_ids is None else BlockSelection(block_ids, BLOCK_SIZE)
    options["query_offset"] = 0 if query_offset is None else query_offset
    options["weights"] = kl_weights

    def loss(*inputs):
        loss, *terms = index_kl(*inputs, selection, **options)
        return loss, terms

    gradients, (kl, index_lse) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
        q, k, index_q, index_k
    )
    return kl, index_lse, gradients


def no_blocks(layout):
    """The whole causal prefix, as in warm-up."""
    return None


def inputs(dtype, num_queries=NUM_KEYS):
    q, k, _ = main_inputs(dtype, num_queries)
    return q, k, *index_inputs(dtype, num_queries)


def weights(num_queries=NUM_KEYS):
    return normal(10, BATCH, NUM_KV_HEADS, num_queries)


class IndexKLTests:
    """Subclass per implementation; `dtypes`, widest first, and `tolerances` are its promise."""

    implementation: str
    dtypes: tuple[str, ...]
    tolerances = KL_TOLERANCES

    def assert_as_oracle(self, arguments, mask, results, kl_weights, **scales):
        kl, index_lse, (_, _, *gradients) = results
        expected = numpy_oracle.index_kl(*exact(*arguments), mask, **scales)
        assert_close(kl, expected[0], self.tolerances)
        assert_close(index_lse, expected[1], self.tolerances)
        expected = numpy_oracle.index_kl_gradients(*exact(*arguments), mask, kl_weights, **scales)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert_close(gradient, wanted, self.tolerances)

    def assert_case(self, layout, blocks, dtype):
        arguments = inputs(dtype, layout.num_queries)
        block_ids, kl_weights = blocks(layout), weights(layout.num_queries)
        results = align(
            *arguments,
            block_ids,
            kl_weights,
            implementation=self.implementation,
            **layout.arrays(),
        )
        self.assert_as_oracle(arguments, layout.support(block_ids), results, kl_weights)
        return results

    @pytest.mark.parametrize("blocks", [no_blocks, learned_blocks, arbitrary_blocks])
    @pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
    def test_value_and_gradients(self, layout, blocks, widest_dtype):
        """The teacher is a constant: main queries and keys get exactly zero."""
        _, _, (dq, dk, _, _) = self.assert_case(layout, blocks, widest_dtype)
        assert (np.asarray(dq) == 0).all()
        assert (np.asarray(dk) == 0).all()

    @pytest.mark.parametrize("blocks", [no_blocks, arbitrary_blocks])
    def test_dtypes(self, blocks, dtype):
        kl, index_lse, gradients = self.assert_case(PACKED, blocks, dtype)
        assert all(x.dtype == dtype for x in gradients)
        for x in (kl, index_lse):
            assert x.dtype == ("float64" if dtype == "float64" else "float32")

    def test_scales(self, widest_dtype):
        arguments, scales = inputs(widest_dtype), {"scale": 0.7, "index_scale": 1.3}
        results = align(*arguments, None, weights(), implementation=self.implementation, **scales)
        self.assert_as_oracle(arguments, ONE_DOCUMENT.support(), results, weights(), **scales)

    @pytest.mark.parametrize("blocks", [no_blocks, arbitrary_blocks])
    def test_gradient_per_score(self, blocks, widest_dtype):
        """(student - teacher) / N: zero in sum over a row, exactly zero outside the support.

        Index keys that are unit vectors make each index query its own row of scores.
        """
        q, k, _ = main_inputs(widest_dtype)
        scores = jnp.asarray(normal(11, BATCH, NUM_KEYS, NUM_KV_HEADS, NUM_KEYS), widest_dtype)
        one_hot = jnp.broadcast_to(
            jnp.eye(NUM_KEYS, dtype=widest_dtype), (BATCH, NUM_KEYS, NUM_KEYS)
        )
        block_ids = blocks(PACKED)
        mask = PACKED.support(block_ids)
        count = mask.any(-1).sum()
        _, _, (_, _, gradient, _) = align(
            q,
            k,
            scores,
            one_hot,
            block_ids,
            np.full(mask.shape[:3], 1 / count),
            index_scale=1.0,
            implementation=self.implementation,
            **PACKED.arrays(),
        )
        gradient = np.moveaxis(np.asarray(gradient, np.float64), 1, 2)
        arguments = exact(q, k, scores, one_hot)
        teacher, student, _ = numpy_oracle.teacher_and_student(*arguments, mask, index_scale=1.0)
        tolerance = self.tolerances[widest_dtype]
        np.testing.assert_allclose(gradient, (student - teacher) / count, atol=tolerance / count)
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=NUM_KEYS * tolerance / count)
        assert (gradient[~mask] == 0).all()
        assert np.abs(gradient).max() > 0.1 / count

    @pytest.mark.fast
    def test_padding_and_empty_supports_are_zero_with_zero_gradients(self, dtype):
        block_ids = arbitrary_blocks(PACKED)
        nothing = ~PACKED.support(block_ids).any(-1)
        kl, index_lse, (_, _, dindex_q, dindex_k) = align(
            *inputs(dtype),
            block_ids,
            weights(),
            implementation=self.implementation,
            **PACKED.arrays(),
        )
        assert (np.asarray(kl)[nothing] == 0).all()
        assert (np.asarray(index_lse)[nothing] == -np.inf).all()
        assert np.isfinite(np.asarray(index_lse)[~nothing]).all()
        assert (np.asarray(dindex_q)[np.moveaxis(nothing, 1, 2)] == 0).all()
        assert (np.asarray(dindex_k)[PACKED.segment_ids == 0] == 0).all()
        assert all(np.isfinite(x).all() for x in exact(kl, dindex_q, dindex_k))

    @pytest.mark.fast
    def test_is_zero_where_the_student_is_the_teacher_and_positive_elsewhere(self, widest_dtype):
        q, k, _ = main_inputs(widest_dtype)
        one_head = q[:, :, :1], k[:, :, :1]
        same = (*one_head, q[:, :, :1], k[:, :, 0])
        other = (*one_head, q[:, :, 1:2], k[:, :, 0])
        ones = np.ones((BATCH, 1, NUM_KEYS))
        zero, _, gradients = align(*same, None, ones, implementation=self.implementation)
        tolerance = 10 * self.tolerances[widest_dtype]
        for x in (zero, *gradients):
            np.testing.assert_allclose(np.asarray(x), 0, atol=tolerance)
        positive, _, _ = align(*other, None, ones, implementation=self.implementation)
        np.testing.assert_allclose(positive[..., 0], 0, atol=tolerance, err_msg="a single token")
        assert (np.asarray(positive)[..., 1:] > 1e-3).all()

    def test_student_probabilities_that_underflow(self, dtype):
        """A student that rules out what the teacher attends to costs much, but not infinity."""
        q, k, index_q, index_k = inputs(dtype)
        arguments = (q, k, index_q * 256, index_k * 8)
        kl, index_lse, gradients = align(
            *arguments, None, weights(), implementation=self.implementation
        )
        expected = numpy_oracle.teacher_and_student(*exact(*arguments), ONE_DOCUMENT.support())
        assert expected[1][ONE_DOCUMENT.support()].min() == 0
        assert_close(index_lse, expected[2], self.tolerances)
        assert np.isfinite(np.asarray(kl)).all()
        assert np.asarray(kl).max() > 1000
        assert all(np.isfinite(x).all() for x in exact(*gradients))


class TestReference(IndexKLTests):
    implementation = "reference"
    dtypes = INPUT_DTYPES

    @pytest.mark.parametrize("blocks", [no_blocks, arbitrary_blocks])
    def test_gradients_are_the_finite_differences_of_the_oracle(self, blocks):
        block_ids, kl_weights = blocks(PACKED), weights()
        mask = PACKED.support(block_ids)
        with jax.enable_x64(True):
            arguments = inputs("float64")
            _, _, (_, _, *gradients) = align(
                *arguments,
                block_ids,
                kl_weights,
                implementation=self.implementation,
                **PACKED.arrays(),
            )
            arguments, gradients = exact(*arguments), exact(*gradients)

        def loss(*arguments):
            return (numpy_oracle.index_kl(*arguments, mask)[0] * kl_weights).sum()

        for wrt, gradient in zip((2, 3), gradients, strict=True):
            for seed in range(3):
                direction = normal(seed, *gradient.shape)
                slope = finite_difference(loss, arguments, wrt, direction)
                np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)
