"""Scores against the logits of whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import CONFIG

from msa_jax.eval import scoring
from msa_jax.model import Transformer

ROWS, LENGTH = 3, 40

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model(filled):
    return filled(lambda rngs: Transformer(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def log_probs(model, tokens):
    return np.asarray(jax.jit(lambda m, t: jax.nn.log_softmax(m(t).logits))(model, tokens))


def test_token_scores_are_those_of_the_logits_in_uneven_chunks(
    model, tokens, log_probs, monkeypatch
):
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", 50)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, ::3] = log_probs.argmax(-1)[:, ::3]
    scores = scoring.score_tokens(model, tokens, targets)
    expected = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.log_probs, expected, rtol=1e-4)
    np.testing.assert_array_equal(scores.greedy, log_probs.argmax(-1) == targets)
    assert scores.greedy.mean() > 0.3


def test_logits_of_all_tokens_are_never_there(model, monkeypatch):
    """Compiled for a long row and a large vocabulary, temporaries stay below one logit array."""
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", 64)
    length, vocabulary = 2048, 4096
    rng = np.random.default_rng(0)
    embedding = nnx.clone(model.embedding)
    embedding.table.set_value(jnp.asarray(rng.normal(size=(vocabulary, 16)), jnp.float32))
    embedding.head.set_value(jnp.asarray(rng.normal(size=(16, vocabulary)), jnp.float32))

    class Head(nnx.Module):
        def __init__(self):
            self.embedding = embedding

    x, targets = jnp.zeros((1, length, 16)), jnp.zeros((1, length), jnp.int32)
    compiled = jax.jit(scoring.score_states.__wrapped__).lower(Head(), x, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * vocabulary * 4 / 8


def test_answers_are_scored_as_without_a_cache(model, tokens):
    rng = np.random.default_rng(1)
    candidates = rng.integers(0, 256, (ROWS, 2, 5)).astype(np.int32)
    scores = scoring.score_answers(model, tokens, candidates, max_new_tokens=5)
    forward = jax.jit(lambda m, t: jax.nn.log_softmax(m(t).logits))
    for place in range(2):
        whole = np.concatenate([tokens, candidates[:, place]], axis=1)
        expected = np.asarray(forward(model, whole))[:, LENGTH - 1 : -1]
        expected = np.take_along_axis(expected, candidates[:, place, :, None], -1)[..., 0]
        np.testing.assert_allclose(scores.log_probs[:, place], expected, rtol=1e-3, atol=1e-4)
    whole = np.concatenate([tokens, scores.tokens], axis=1)
    greedy = np.asarray(forward(model, whole)).argmax(-1)[:, LENGTH - 1 : -1]
    np.testing.assert_array_equal(scores.tokens, greedy)


def test_choices_are_of_the_asked_places(model, tokens, log_probs):
    places = np.array([[0, 7], [39, 3], [20, 20]], np.int32)
    candidates = np.array([200, 3, 77], np.int32)
    likeliest, best = scoring.choose_tokens(model, tokens, places, candidates)
    asked = np.take_along_axis(log_probs, places[..., None], 1)
    np.testing.assert_array_equal(likeliest, asked.argmax(-1))
    np.testing.assert_array_equal(best, candidates[asked[..., candidates].argmax(-1)])
