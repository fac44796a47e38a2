"""What every mixer promises, of those that keep a latent or a state instead of keys and values.

A row holds 40 tokens; chunks of 8 and 12, so that documents, prompts and the row end inside one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax.attention import Mixer, build_mixer
from msa_jax.cache import after_prompts, before_prompts
from msa_jax.config import AttentionConfig, ConfigError
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.sharding import make_mesh

BATCH, LENGTH, D_MODEL = 2, 40, 12
X = jax.ShapeDtypeStruct((BATCH, 4, D_MODEL), jnp.float32)
CONFIG = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_dim=0,
    rope_theta=100.0,
    # Single tokens are absorbed, chunks expanded.
    mla=MLAConfig(latent_dim=16, rope_head_dim=2, value_dim=9),
    linear=LinearConfig(value_dim=6, chunk_size=8),
    mamba2=Mamba2Config(state_dim=5, head_dim=6, chunk_size=12),
)
KINDS = ("mla", "linear", "mamba2")
SPANS = ((0, 13), (14, 38))  # documents, with padding behind each

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def make_mixer(filled):
    """`make_mixer(config)`: the layer with arbitrary parameters."""

    def make(config, **options):
        def build(rngs):
            return build_mixer(config, D_MODEL, computes_selection=False, rngs=rngs, **options)

        return filled(build)

    return make


@pytest.fixture(scope="module", params=KINDS)
def mixer(request, make_mixer):
    return make_mixer(config_of(request.param))


def config_of(kind):
    return dataclasses.replace(CONFIG, kind=kind)


@jax.jit
def forward(mixer, x, segment_ids, positions):
    return mixer(x, segment_ids=segment_ids, positions=positions).y


@jax.jit
def decode(mixer, x, cache):
    mixed = mixer(x, cache=cache)
    return mixed.y, mixed.cache


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)


def documents(*spans):
    """Segment ids and positions of documents at (start, stop), padding elsewhere; rows alike."""
    segment_ids, positions = np.zeros((2, BATCH, LENGTH), np.int32)
    for number, (start, stop) in enumerate(spans):
        segment_ids[:, start:stop] = number + 1
        positions[:, start:stop] = np.arange(stop - start)
    return segment_ids, positions


WHOLE = documents((0, LENGTH))


@pytest.mark.parametrize("size", [1, 8])
def test_cached_decoding_is_the_full_forward_pass(size, mixer):
    """Token by token, which steps the recurrences, and in chunks."""
    x, cache, parts = inputs(), mixer.init_cache(BATCH, LENGTH), []
    for start in range(0, LENGTH, size):
        y, cache = decode(mixer, x[:, start : start + size], cache)
        parts.append(y)
    expected = forward(mixer, x, *WHOLE)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("size", [1, 8])
def test_padding_behind_a_prompt_leaves_no_trace(size, mixer):
    """Row 1 holds 11 tokens of a prompt of 16, so that a chunk is part padding."""
    x, lengths = inputs(), jnp.array([16, 11], jnp.int32)
    expected = np.asarray(forward(mixer, x, *WHOLE))
    fed = x[:, :16].copy()
    fed[1, 11:] = 100
    cache = before_prompts(mixer.init_cache(BATCH, LENGTH), lengths)
    for start in range(0, 16, size):
        y, cache = decode(mixer, fed[:, start : start + size], cache)
    cache = after_prompts(cache, lengths)
    assert cache.length.tolist() == [16, 11]
    for start, stop in ((16, 24), (24, 25), (25, 33)):
        places = (slice(start, stop), slice(start - 5, stop - 5))
        y, cache = decode(mixer, np.stack([x[row, p] for row, p in enumerate(places)]), cache)
        for row, place in enumerate(places):
            np.testing.assert_allclose(y[row], expected[row, place], rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [33, 28]


def test_a_future_token_changes_no_past_output(mixer):
    x, changed = inputs(), inputs()
    changed[:, 21:] = 5 * inputs(seed=1)[:, 21:]
    y, other = (np.asarray(forward(mixer, a, *WHOLE)) for a in (x, changed))
    np.testing.assert_array_equal(y[:, :21], other[:, :21])
    assert (np.abs(y - other)[:, 21:].max(-1) > 1e-3).all()


def test_packed_documents_are_each_alone(mixer):
    """And padding gets nothing, and changes nothing."""
    x, (segment_ids, positions) = inputs(), documents(*SPANS)
    y = np.asarray(forward(mixer, x, segment_ids, positions))
    for start, stop in SPANS:
        alone = np.full_like(x, 100)
        alone[:, : stop - start] = x[:, start:stop]
        expected = forward(mixer, alone, *documents((0, stop - start)))[:, : stop - start]
        np.testing.assert_allclose(y[:, start:stop], expected, rtol=1e-4, atol=1e-5)
    assert (y[segment_ids == 0] == 0).all()
    x[segment_ids == 0] = 100
    np.testing.assert_array_equal(forward(mixer, x, segment_ids, positions), y)


def test_every_parameter_has_a_finite_gradient(mixer):
    """With packed documents and padding, whose masked entries are where NaNs come from."""
    graph, params = nnx.split(mixer, nnx.Param)
    weights = jnp.asarray(inputs(seed=2))

    @jax.jit
    @jax.grad
    def gradient(params, x, segment_ids):
        return (nnx.merge(graph, params)(x, segment_ids=segment_ids).y * weights).sum()

    for path, leaf in nnx.to_flat_state(gradient(params, inputs(), documents(*SPANS)[0])):
        array = np.asarray(leaf.get_value())
        assert np.isfinite(array).all(), path
        assert np.abs(array).max() > 1e-4, path


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_wide_states(kind, make_mixer):
    config = config_of(kind)
    narrow, exact = make_mixer(config, dtype="bfloat16"), make_mixer(config)
    y, expected = (np.asarray(forward(m, inputs(), *WHOLE)) for m in (narrow, exact))
    assert np.abs(y - expected).max() < 0.04 * np.abs(expected).max()
    cache = jax.eval_shape(lambda x: vars(narrow(x, cache=narrow.init_cache(BATCH, 5)).cache), X)
    for name in cache.keys() - {"length", "limit"}:
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(cache[name])}
        assert dtypes == {jnp.dtype("float32" if name == "state" else "bfloat16")}, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_cache_is_refused(kind, make_mixer):
    layer = make_mixer(config_of(kind))
    assert isinstance(layer, Mixer)
    with pytest.raises(ValueError, match="a cache holds one document per row"):
        layer(
            jnp.asarray(inputs()),
            segment_ids=jnp.asarray(WHOLE[0]),
            cache=layer.init_cache(BATCH, LENGTH),
        )


@pytest.mark.parametrize("kind", ["linear", "mamba2"])
def test_a_recurrent_cache_does_not_grow(kind, make_mixer):
    layer = make_mixer(config_of(kind))
    sizes = [sum(a.nbytes for a in jax.tree.leaves(layer.init_cache(1, n))) for n in (1, 1000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["linear", "mamba2"])
def test_a_state_cannot_cross_a_split_sequence(kind, make_mixer):
    layer = make_mixer(config_of(kind))
    message = rf"mesh\.context=2: attention\.kind='{kind}' passes a state.*set mesh\.context=1"
    with (
        jax.set_mesh(make_mesh({"context": 2}, jax.devices()[:2])),
        pytest.raises(ConfigError, match=message),
    ):
        jax.eval_shape(lambda x: layer(x).y, X)


def test_mamba2_heads_must_fill_its_inner_width(make_mixer):
    config = dataclasses.replace(config_of("mamba2"), mamba2=Mamba2Config(head_dim=7))
    with pytest.raises(ConfigError, match=r"mamba2\.head_dim=7: must divide the inner width 24"):
        make_mixer(config)
