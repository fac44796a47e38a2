"""Gated feed-forward layers against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.nn.feed_forward import FeedForward, gated


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(gate, up):
    return gate * sigmoid(gate) * up


def swiglu_oai(gate, up):
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS = {"swiglu": swiglu, "swiglu_oai": swiglu_oai}


@pytest.mark.fast
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_at_every_clamp(activation):
    """gate has no lower clamp; up has both."""
    values = np.array([-30, -8, -7, -1, -0.5, 0, 0.5, 1, 6, 7, 8, 30], np.float32)
    gate, up = (grid.ravel() for grid in np.meshgrid(values, values))
    actual = jax.jit(gated, static_argnums=2)(gate, up, activation)
    expected = ACTIVATIONS[activation](gate.astype(float), up.astype(float))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_is_down_of_the_gated_product(activation, filled):
    layer = filled(lambda rngs: FeedForward(6, 10, activation=activation, rngs=rngs))
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
    gate, up, down = (np.asarray(w[...], float) for w in (layer.gate, layer.up, layer.down))
    expected = ACTIVATIONS[activation](x @ gate, x @ up) @ down
    np.testing.assert_allclose(jax.jit(layer)(x), expected, rtol=1e-5, atol=1e-5)


def test_matmuls_run_in_dtype_and_the_output_is_as_the_input(filled):
    layer = filled(lambda rngs: FeedForward(6, 10, dtype="bfloat16", rngs=rngs))
    x = jnp.ones((1, 2, 6), jnp.float32)
    jaxpr = jax.make_jaxpr(layer)(x)
    matmuls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(matmuls) == 3
    for matmul in matmuls:
        assert {str(value.aval.dtype) for value in matmul.invars} == {"bfloat16"}
    assert jaxpr.out_avals[0].dtype == jnp.float32
    assert layer.gate.dtype == jnp.float32
