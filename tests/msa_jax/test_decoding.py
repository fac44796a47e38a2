"""Generation: greedy is the argmax of the uncached model, sampling stays within its nucleus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig
from msa_jax.decoding import generate, sample
from msa_jax.model import Transformer

VOCAB, WIDTH, NEW, STOP = 11, 12, 10, 3
LENGTHS = (12, 7, 1)
CONFIG = ArchitectureConfig(
    ModelConfig(vocab_size=VOCAB, d_model=12, num_layers=2, ffn_dim=10, compute_dtype="float32"),
    AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_dim=4,
        rope_theta=100.0,
        block_size=4,
        top_k=2,
        index_dim=4,
    ),
    MoEConfig(num_experts=0),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
draw = jax.jit(sample, static_argnames=("temperature", "top_p"))


@pytest.fixture(scope="module")
def model(filled):
    return filled(lambda rngs: Transformer(CONFIG, rngs=rngs))


def prompts(padding=0):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), WIDTH)).astype(np.int32)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = padding
    return jnp.asarray(tokens)


def uncached_greedy(model):
    """One token at a time from the whole forward pass, each row on its own."""
    forward = jax.jit(lambda model, tokens: model(tokens).logits)
    rows = np.zeros((len(LENGTHS), WIDTH + NEW), np.int32)
    rows[:, :WIDTH] = prompts()
    for step in range(NEW):
        logits = np.asarray(forward(model, rows))
        for row, length in enumerate(LENGTHS):
            rows[row, length + step] = logits[row, length + step - 1].argmax()
    return [rows[row, length : length + NEW] for row, length in enumerate(LENGTHS)]


@pytest.mark.fast
def test_greedy_is_the_argmax_of_the_uncached_model(model):
    """For prompts of different lengths, whatever their padding."""
    lengths, expected = jnp.array(LENGTHS, jnp.int32), uncached_greedy(model)
    assert len(np.unique(expected)) > 3
    for padding in (0, 5):
        tokens = generate(model, prompts(padding), prompt_lengths=lengths, max_new_tokens=NEW)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, expected)


def test_sampling_follows_its_key_and_stops(model):
    """After the stop token a row repeats it; without one it goes on."""
    few = jnp.tile(prompts()[:1], (8, 1))

    def run(seed, model=model):
        options = {"temperature": 1.0, "top_p": 0.9, "stop_token": STOP}
        key = jax.random.key(seed)
        return np.asarray(generate(model, few, max_new_tokens=NEW, key=key, **options))

    tokens, other = run(0), run(1)
    np.testing.assert_array_equal(tokens, run(0))
    assert (tokens != other).any()
    lengths = []
    for row in np.concatenate([tokens, other]):
        stops = np.flatnonzero(row == STOP)
        lengths.append(stops[0] if len(stops) else NEW)
        assert (row[lengths[-1] :] == STOP).all()
    assert NEW in lengths, "every row stopped"
    assert any(0 < length < NEW - 1 for length in lengths), "no row stopped on its way"

    # Equal logits everywhere: what differs between steps and rows is the draw alone.
    indifferent = jax.tree.map(lambda leaf: leaf, model)
    indifferent.embedding.head.set_value(jnp.zeros_like(model.embedding.head[...]))
    tokens = run(0, indifferent)
    assert len(np.unique(tokens[:, 0])) > 3
    assert max(len(np.unique(row)) for row in tokens) > 3


LOGITS = np.log([0.4, 0.05, 0.3, 0.1, 0.15]).astype(np.float32)
DRAWS = 4000


def frequencies(**options):
    logits = np.tile(LOGITS, (DRAWS, 1))
    tokens = draw(jax.random.key(0), logits, **options)
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=len(LOGITS)) / DRAWS


def nucleus(top_p):
    """The fewest most likely tokens that reach top_p, renormalised."""
    probabilities = np.exp(LOGITS)
    kept = np.zeros(len(LOGITS))
    for token in np.argsort(-probabilities):
        if kept.sum() >= top_p:
            break
        kept[token] = probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("top_p", "size"), [(1.0, 5), (0.96, 5), (0.9, 4), (0.8, 3), (0.5, 2), (0.3, 1), (1e-6, 1)]
)
def test_samples_stay_in_the_nucleus_and_have_its_distribution(top_p, size):
    expected = nucleus(top_p)
    assert (expected > 0).sum() == size
    actual = frequencies(temperature=1.0, top_p=top_p)
    assert (actual[expected == 0] == 0).all()
    np.testing.assert_allclose(actual, expected, atol=0.03)  # four standard deviations


def test_temperature_sharpens_before_the_nucleus_is_cut():
    probabilities = np.exp(LOGITS) ** 2
    probabilities /= probabilities.sum()
    np.testing.assert_allclose(frequencies(temperature=0.5, top_p=1.0), probabilities, atol=0.03)
    # The two best hold 0.7 of the mass as it is, and 0.88 at temperature 0.5.
    assert (frequencies(temperature=0.5, top_p=0.8) > 0).sum() == 2


def test_temperature_zero_takes_the_first_of_the_most_likely():
    logits = jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])
    assert draw(jax.random.key(0), logits, temperature=0.0, top_p=1.0).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be >= 1"),
        ({"prompt_lengths": [3, 0, 2]}, r"prompt_lengths=\[3, 0, 2\] must lie between 1 and .* 12"),
        ({"prompt_lengths": [3, 13, 2]}, "padded on the right"),
        ({"temperature": -1.0}, "temperature=-1.0 must be >= 0"),
        ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"temperature": 1.0}, "key=None: sampling at temperature > 0 needs a random key"),
    ],
)
def test_bad_options_are_errors_that_name_them(options, message, model):
    options = {"max_new_tokens": 1} | options
    if "prompt_lengths" in options:
        options["prompt_lengths"] = jnp.array(options["prompt_lengths"], jnp.int32)
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(), **options)
