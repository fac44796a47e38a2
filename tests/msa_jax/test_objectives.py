"""The terms of the training loss against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.objectives import alignment_loss, balance_loss, token_losses


def test_token_loss_is_the_negative_log_probability_of_the_target():
    rng = np.random.default_rng(0)
    logits = 5 * rng.normal(size=(2, 3, 7))
    targets = rng.integers(0, 7, (2, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, targets[..., None], -1)[..., 0])
    actual = jax.jit(token_losses)(logits.astype(np.float32), targets.astype(np.int32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_token_loss_of_huge_logits_is_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0]]])
    assert token_losses(logits, jnp.array([[0]])).item() == 0
    assert token_losses(logits, jnp.array([[2]])).item() == pytest.approx(1e30)


def test_alignment_is_the_sum_or_the_mean_over_layers():
    aux = {"index_kl": jnp.array([1.0, 2.0, 6.0])}
    assert alignment_loss(aux, "sum") == 9
    assert alignment_loss(aux, "mean") == 3
    assert alignment_loss({"router_entropy": jnp.ones(2)}, "sum") == 0


def test_balance_is_the_mean_over_layers():
    assert balance_loss({"balance_loss": jnp.array([1.0, 2.0])}) == 1.5
    assert balance_loss({}) == 0
