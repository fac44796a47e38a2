"""Modules with arbitrary values, and compilation without most of LLVM's optimisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="module")
def quick_compilation():
    """Most of these tests' time is compilation, and half of that is optimisation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def filled():
    """`filled(make, seed=0)`: the module that `make(rngs)` builds, every variable random.

    Gains and selection biases too, whose fresh value 0 would hide an error. Compiles nothing.
    """

    def filled(make, seed=0, scale=0.3):
        rng = np.random.default_rng(seed)
        shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0)))

        def draw(leaf):
            return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

        return jax.tree.map(draw, shapes)

    return filled
