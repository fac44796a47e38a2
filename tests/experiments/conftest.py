"""Compilation without most of LLVM's optimisation."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Most of these tests' time is compilation, and half of that is optimisation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
