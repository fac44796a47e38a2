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
from msa_jax.cache import RecurrentCache, after_prompts, before_prompts
from msa_jax.config import AttentionConfig, ConfigError
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.sharding import make_mesh

BATCH, LENGTH, D_MODEL = 2, 40, 12
SHARED = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_dim=0,
    rope_theta=100.0,
    # Up to 5 tokens at once are absorbed, more expanded.
    mla=MLAConfig(latent_dim=16, rope_head_dim=2),
    linear=LinearConfig(value_dim=6, chunk_size=8),
    mamba2=Mamba2Config(state_dim=5, head_dim=6, chunk_size=12),
)
CASES = {
    "mla": dataclasses.replace(SHARED, kind="mla"),
    "mla with latent queries and wide values": dataclasses.replace(
        SHARED, kind="mla", mla=dataclasses.replace(SHARED.mla, query_latent_dim=7, value_dim=9)
    ),
    "linear": dataclasses.replace(SHARED, kind="linear"),
    "linear without convolution": dataclasses.replace(
        SHARED, kind="linear", linear=LinearConfig(conv_width=1, chunk_size=64)
    ),
    "mamba2": dataclasses.replace(SHARED, kind="mamba2"),
}
KINDS = ("mla", "linear", "mamba2")
SPANS = ((0, 13), (16, 38))  # documents, with padding behind each

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def make_mixer(filled):
    """`make_mixer(config)`: the layer with arbitrary parameters."""

    def make(config, **options):
        def build(rngs):
            return build_mixer(config, D_MODEL, computes_selection=False, rngs=rngs, **options)

        return filled(build)

    return make


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.fast] * (name in KINDS)) for name in CASES],
)
def mixer(request, make_mixer):
    return make_mixer(CASES[request.param])


@jax.jit
def forward(mixer, x, segment_ids):
    return mixer(x, segment_ids=segment_ids).y


@jax.jit
def decode(mixer, x, cache):
    mixed = mixer(x, cache=cache)
    return mixed.y, mixed.cache


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)


def documents(*spans):
    """Segment ids of documents at (start, stop), padding elsewhere; every row alike."""
    segment_ids = np.zeros((BATCH, LENGTH), np.int32)
    for number, (start, stop) in enumerate(spans):
        segment_ids[:, start:stop] = number + 1
    return segment_ids


WHOLE = documents((0, LENGTH))


def positions(segment_ids):
    """Counted from each document's start."""
    slots = np.arange(LENGTH)
    starts = np.flatnonzero(np.diff(segment_ids[0], prepend=-1))
    return slots - starts[np.searchsorted(starts, slots, side="right") - 1]


@pytest.mark.parametrize("sizes", [(1,), (8, 1), (13, 9)], ids=["single", "prompt", "chunks"])
def test_cached_decoding_is_the_full_forward_pass(sizes, mixer):
    """The last size is repeated. Length 1 steps the recurrence, others go in chunks."""
    x = inputs()[:, :31]
    expected = np.asarray(forward(mixer, inputs(), WHOLE))
    cache, parts, start = mixer.init_cache(BATCH, LENGTH), [], 0
    while start < x.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        y, cache = decode(mixer, x[:, start : start + size], cache)
        parts.append(y)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, 1), expected[:, :31], rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [31, 31]


@pytest.mark.parametrize("chunk", [20, 1], ids=["at once", "single"])
def test_padding_behind_a_prompt_leaves_no_trace(chunk, mixer):
    """Row 1 holds 13 tokens of a prompt of 20, in chunks of which one is part padding."""
    x, lengths = inputs(), jnp.array([20, 13], jnp.int32)
    expected = np.asarray(forward(mixer, x, WHOLE))
    fed = x[:, :20].copy()
    fed[1, 13:] = 100
    cache = before_prompts(mixer.init_cache(BATCH, LENGTH), lengths)
    for start in range(0, 20, chunk):
        y, cache = decode(mixer, fed[:, start : start + chunk], cache)
    cache = after_prompts(cache, lengths)
    assert cache.length.tolist() == [20, 13]
    behind = np.stack([x[0, 20:32], x[1, 13:25]])
    for size in (4, 1, 1, 6):
        y, cache = decode(mixer, behind[:, :size], cache)
        behind = behind[:, size:]
    stop = cache.length
    assert stop.tolist() == [32, 25]
    for row in range(BATCH):
        last = expected[row, stop[row] - 6 : stop[row]]
        np.testing.assert_allclose(y[row], last, rtol=1e-4, atol=1e-5)


def test_a_future_token_changes_no_past_output(mixer):
    x, changed = inputs(), inputs()
    changed[:, 21:] = 5 * inputs(seed=1)[:, 21:]
    y, other = (np.asarray(forward(mixer, a, WHOLE)) for a in (x, changed))
    np.testing.assert_array_equal(y[:, :21], other[:, :21])
    assert (np.abs(y - other)[:, 21:].max(-1) > 1e-3).all()


def test_packed_documents_are_each_alone(mixer):
    """And padding gets nothing."""
    x, segment_ids = inputs(), documents(*SPANS)
    place = jnp.asarray(np.tile(positions(segment_ids), (BATCH, 1)), jnp.int32)
    y = np.asarray(
        jax.jit(lambda *a: a[0](a[1], segment_ids=a[2], positions=a[3]).y)(
            mixer, x, segment_ids, place
        )
    )
    for start, stop in SPANS:
        alone = np.full_like(x, 100)
        alone[:, : stop - start] = x[:, start:stop]
        expected = forward(mixer, alone, documents((0, stop - start)))[:, : stop - start]
        np.testing.assert_allclose(y[:, start:stop], expected, rtol=1e-4, atol=1e-5)
    assert (y[segment_ids == 0] == 0).all()


def test_padding_changes_nothing(mixer):
    x, segment_ids = inputs(), documents(*SPANS)
    padded = x.copy()
    padded[segment_ids == 0] = 100
    y, other = (forward(mixer, a, segment_ids) for a in (x, padded))
    np.testing.assert_array_equal(y, other)


def test_every_parameter_has_a_finite_gradient(mixer):
    """With packed documents and padding, whose masked entries are where NaNs come from."""
    graph, params = nnx.split(mixer, nnx.Param)
    weights = jnp.asarray(inputs(seed=2))

    @jax.jit
    @jax.grad
    def gradient(params, x, segment_ids):
        return (nnx.merge(graph, params)(x, segment_ids=segment_ids).y * weights).sum()

    for path, leaf in nnx.to_flat_state(gradient(params, inputs(), documents(*SPANS))):
        array = np.asarray(leaf.get_value())
        assert np.isfinite(array).all(), path
        assert np.abs(array).max() > 1e-4, path


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_wide_states(kind, make_mixer):
    config = CASES[kind]
    narrow, exact = make_mixer(config, dtype="bfloat16"), make_mixer(config)
    x = inputs()
    y, expected = (np.asarray(forward(m, x, WHOLE)) for m in (narrow, exact))
    assert np.abs(y - expected).max() < 0.04 * np.abs(expected).max()
    cache = narrow.init_cache(BATCH, LENGTH)
    if isinstance(cache, RecurrentCache):
        _, cache = decode(narrow, x[:, :5], cache)
        assert cache.state.dtype == jnp.float32
        assert {tail.dtype for tail in cache.tails} == {jnp.dtype("bfloat16")}
    else:
        assert cache.latent.dtype == cache.rope_k.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_cache_is_refused(kind, make_mixer):
    layer = make_mixer(CASES[kind])
    assert isinstance(layer, Mixer)
    with pytest.raises(ValueError, match="a cache holds one document per row"):
        layer(
            jnp.asarray(inputs()),
            segment_ids=jnp.asarray(WHOLE),
            cache=layer.init_cache(BATCH, LENGTH),
        )


@pytest.mark.parametrize("kind", ["linear", "mamba2"])
def test_a_recurrent_cache_does_not_grow(kind, make_mixer):
    layer = make_mixer(CASES[kind])
    sizes = [sum(a.nbytes for a in jax.tree.leaves(layer.init_cache(1, n))) for n in (1, 1000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", ["linear", "mamba2"])
def test_a_state_cannot_cross_a_split_sequence(kind, make_mixer):
    layer = make_mixer(CASES[kind])
    message = rf"mesh\.context=2: attention\.kind='{kind}' passes a state.*set mesh\.context=1"
    with (
        jax.set_mesh(make_mesh({"context": 2}, jax.devices()[:2])),
        pytest.raises(ConfigError, match=message),
    ):
        jax.eval_shape(lambda x: layer(x).y, jax.ShapeDtypeStruct((2, 8, D_MODEL), jnp.float32))


def test_mamba2_heads_must_fill_its_inner_width(make_mixer):
    config = dataclasses.replace(CASES["mamba2"], mamba2=Mamba2Config(head_dim=7))
    with pytest.raises(ConfigError, match=r"mamba2\.head_dim=7: must divide the inner width 24"):
        make_mixer(config)
