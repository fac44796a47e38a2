"""Parameters: initial value, dtype and logical axes in one description."""

import math

import jax
import jax.numpy as jnp
from flax import nnx


def matrix(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    fan_in: int,
    dtype: str,
    scale: float = 1.0,
) -> nnx.Param:
    """A weight with truncated-normal values of standard deviation scale / sqrt(fan_in)."""
    # A normal cut at two deviations has 0.8796 of its variance's root left.
    deviation = scale / math.sqrt(fan_in) / 0.87962566103423978
    value = jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32) * deviation
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def gain(size: int, dtype: str) -> nnx.Param:
    """The w of a (1 + w) norm, which starts at 0."""
    return nnx.Param(jnp.zeros(size, dtype), logical_axes=(None,))
