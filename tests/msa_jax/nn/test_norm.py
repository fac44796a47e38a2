"""RMSNorm against its equation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.nn.norm import RMSNorm


def normed(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + np.asarray(weight))


@pytest.mark.fast
def test_gain_is_one_plus_weight_and_eps_is_inside_the_root(filled):
    norm = filled(lambda rngs: RMSNorm(6, eps=0.5))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(norm)(x), normed(x, norm.weight[...], 0.5), rtol=1e-5, atol=1e-6
    )


def test_a_fresh_norm_has_gain_one():
    norm = RMSNorm(4, param_dtype="bfloat16")
    assert norm.weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm.weight[...], np.zeros(4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_inputs_are_normed_in_float32(dtype, filled):
    """1000 squared is infinite in float16, and 3 bfloat16 digits are not enough for a mean."""
    norm = filled(lambda rngs: RMSNorm(64))
    x = jnp.asarray(1000 + np.random.default_rng(0).normal(size=(5, 64)), dtype)
    y = jax.jit(norm)(x)
    assert y.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), normed(x, norm.weight[...], 1e-6), rtol=rounding
    )
