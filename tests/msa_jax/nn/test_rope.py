"""Partial RoPE: the rotation of complex numbers that it is, and what follows from that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.nn.rope import apply_rope

ROPE_DIM, THETA = 6, 100.0
rope = jax.jit(apply_rope, static_argnames=("rope_dim", "theta"))


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def rotated(x, positions):
    """Dim i and dim i + half as a complex number, turned by position * theta^(-i / half)."""
    half = ROPE_DIM // 2
    z = x[..., :half] + 1j * x[..., half:ROPE_DIM]
    angle = positions[..., None] * THETA ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), half))
    return np.concatenate([z.real, z.imag, x[..., ROPE_DIM:]], axis=-1)


@pytest.mark.fast
@pytest.mark.parametrize("heads", [(), (3,)], ids=["one head", "heads"])
def test_rotates_the_leading_dims_by_the_position(heads):
    x = normal(2, 5, *heads, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 1, 500]], np.int32)
    y = rope(x, positions, rope_dim=ROPE_DIM, theta=THETA)
    np.testing.assert_allclose(y, rotated(x, positions), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[..., ROPE_DIM:], x[..., ROPE_DIM:])
    np.testing.assert_array_equal(y[0, 0], x[0, 0])
    np.testing.assert_allclose(
        np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5, err_msg="length"
    )


def test_scores_depend_on_the_distance_alone():
    """The same q and k everywhere: the score of (i, j) is that of (i - j)."""
    x = np.broadcast_to(normal(2, 1, 8), (2, 12, 8))
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    q, k = np.asarray(rope(x, positions, rope_dim=ROPE_DIM, theta=THETA))
    scores = q @ k.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(scores[0]) > 0.5


def test_rope_dim_zero_is_off():
    x = jnp.asarray(normal(1, 3, 2, 8))
    assert apply_rope(x, jnp.ones((1, 3), jnp.int32), rope_dim=0, theta=THETA) is x


def test_late_positions_keep_their_phase_in_bfloat16():
    """A bfloat16 position would be off by thousands at 2^20."""
    x = np.ones((1, 2, 8))
    positions = np.array([[2**20 - 1, 2**20 - 2]], np.int32)
    y = rope(jnp.asarray(x, "bfloat16"), positions, rope_dim=ROPE_DIM, theta=THETA)
    assert y.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(y, float), rotated(x, positions), atol=0.1)
