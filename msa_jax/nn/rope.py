"""Partial rotary position embedding, half-rotation form."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T *heads D"], positions: Int[Array, "B T"], *, rope_dim: int, theta: float
) -> Float[Array, "B T *heads D"]:
    """Rotates the first `rope_dim` dims of each head by the position; the rest pass.

    Dim i pairs with dim i + rope_dim / 2 and turns by position * theta^(-2 i / rope_dim) radians,
    computed in float32 (float64 for float64 inputs).
    """
    if rope_dim == 0:
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    half = rope_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions.astype(dtype)[..., None] * frequency
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x, [half, rope_dim], axis=-1)
    first, second = first.astype(dtype), second.astype(dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
