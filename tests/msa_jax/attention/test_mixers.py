"""What every token mixer promises: causal, packed documents apart, cached decoding as in full.

One row holds 40 tokens in blocks of 4, so that queries choose 3 of up to 10 blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.attention import Mode, build_mixer
from msa_jax.attention.msa import IndexBranch
from msa_jax.cache import RecurrentCache
from msa_jax.config import AttentionConfig

BATCH, LENGTH, D_MODEL = 2, 40, 12
BLOCK_SIZE, TOP_K = 4, 3
CHUNK = 4
MSA = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    rope_theta=100.0,
    block_size=BLOCK_SIZE,
    top_k=TOP_K,
    index_dim=4,
)
GQA = dataclasses.replace(MSA, kind="gqa")
CASES = {
    "max pooling": MSA,
    "lse pooling": dataclasses.replace(MSA, pooling="lse"),
    "mean pooling": dataclasses.replace(MSA, pooling="mean"),
    "8-bit index": dataclasses.replace(MSA, index_precision="int8"),
    "local and sink blocks": dataclasses.replace(
        MSA, top_k=4, num_local_blocks=2, num_sink_blocks=1
    ),
    "without norms and rope": dataclasses.replace(
        MSA, qk_norm=False, index_norm=False, rope_dim=0, index_rope=False
    ),
    "shared selection": dataclasses.replace(MSA, share_every=2),
    "strided": dataclasses.replace(MSA, selector="strided"),
    "random": dataclasses.replace(MSA, selector="random"),
    "sink and window": dataclasses.replace(MSA, selector="sink_window", num_sink_blocks=1),
    "oracle": dataclasses.replace(MSA, selector="oracle"),
    "gqa": GQA,
    "multi-head": dataclasses.replace(GQA, kind="mha"),
    "multi-query": dataclasses.replace(GQA, num_kv_heads=1),
    "sliding window": dataclasses.replace(MSA, kind="sliding_window", window=7),
    "longformer": dataclasses.replace(MSA, kind="longformer", num_sink_blocks=1),
    "bigbird": dataclasses.replace(
        MSA, kind="bigbird", top_k=4, num_sink_blocks=1, num_random_blocks=1
    ),
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


FAST = ("max pooling", "gqa")
DECODED_ONE_BY_ONE = ("multi-head", "sliding window", "longformer", "bigbird", "sink and window")


@pytest.fixture(scope="module")
def make_mixer(filled):
    """`make_mixer(config, place)`: the layer in that place among those that share a selection."""

    def make(config, place=0):
        def build(rngs):
            return build_mixer(config, D_MODEL, computes_selection=place == 0, rngs=rngs)

        return filled(build, seed=place)

    return make


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.fast] * (name in FAST)) for name in CASES],
)
def layers(request, make_mixer):
    """As many layers as share a selection, the later ones without an index branch of their own."""
    config = CASES[request.param]
    return [make_mixer(config, place) for place in range(config.share_every)]


@jax.jit
def forward(layers, x, positions, segment_ids):
    """Outputs of the layers, one on top of another, and the block ids of the first if it selects.

    The document's own places and segments are always given, so that one compilation serves all.
    """
    outputs, shared, block_ids = [], None, None
    for layer in layers:
        mixed = layer(
            x,
            positions=positions,
            segment_ids=segment_ids,
            shared=shared,
            mode=Mode(selections=True),
        )
        shared, block_ids = mixed.shared, mixed.aux.get("block_ids", block_ids)
        x = x + mixed.y
        outputs.append(mixed.y)
    return jnp.stack(outputs), block_ids


@functools.partial(jax.jit, static_argnames="mode")
def decode(layers, x, caches, mode=Mode()):
    """The same from caches."""
    outputs, shared, new_caches = [], None, []
    for layer, cache in zip(layers, caches, strict=True):
        mixed = layer(x, cache=cache, shared=shared, mode=mode)
        shared = mixed.shared
        x = x + mixed.y
        outputs.append(mixed.y)
        new_caches.append(mixed.cache)
    return jnp.stack(outputs), new_caches


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, LENGTH, D_MODEL)).astype(np.float32)


def one_document():
    """Positions and segment ids."""
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))
    return positions, np.ones((BATCH, LENGTH), np.int32)


def documents(*spans):
    """The same for documents at (start, stop), padding elsewhere; every row alike."""
    positions = np.zeros((BATCH, LENGTH), np.int32)
    segment_ids = np.zeros((BATCH, LENGTH), np.int32)
    for number, (start, stop) in enumerate(spans):
        segment_ids[:, start:stop] = number + 1
        positions[:, start:stop] = np.arange(stop - start)
    return positions, segment_ids


def test_cached_decoding_is_the_full_forward_pass(layers):
    """In chunks; row 1 is a shorter prompt, padded on the right, whose padding is written over."""
    x = inputs()
    expected, _ = forward(layers, x, *one_document())
    prompt, short = 20, 13
    fed = x.copy()
    fed[1, short:prompt] = 100
    caches = [layer.init_cache(BATCH, LENGTH + 3) for layer in layers]
    rows = [[], []]
    for start in range(0, prompt, CHUNK):
        y, caches = decode(layers, fed[:, start : start + CHUNK], caches)
        y = np.asarray(y)
        rows[0].append(y[:, 0])
        rows[1].append(y[:, 1, : max(0, short - start)])
    lengths = jnp.array([prompt, short], jnp.int32)
    caches = [dataclasses.replace(cache, length=lengths) for cache in caches]
    for start in range(0, LENGTH - prompt, CHUNK):
        chunk = [x[0, prompt + start :][:CHUNK], x[1, short + start :][:CHUNK]]
        y, caches = decode(layers, np.stack(chunk), caches)
        y = np.asarray(y)
        rows[0].append(y[:, 0])
        rows[1].append(y[:, 1])
    for row, parts in enumerate(rows):
        y = np.concatenate(parts, axis=1)
        assert y.shape[1] == (LENGTH, LENGTH - prompt + short)[row]
        np.testing.assert_allclose(y, expected[:, row, : y.shape[1]], rtol=1e-4, atol=1e-5)
    assert [cache.length.tolist() for cache in caches] == [[40, 33]] * len(layers)


def test_a_prefill_is_the_forward_pass_and_reads_no_slot_of_the_cache(layers):
    """The slots hold NaN, which a query that looks at any of them would return."""
    x = inputs()
    expected, _ = forward(layers, x, *one_document())
    caches = [poisoned(layer.init_cache(BATCH, LENGTH + 3)) for layer in layers]
    y, caches = decode(layers, x, caches, mode=Mode(prefill=True))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert [cache.length.tolist() for cache in caches] == [[LENGTH, LENGTH]] * len(layers)


def poisoned(cache):
    """A recurrent state is no slot: the first token reads it."""
    if isinstance(cache, RecurrentCache):
        return cache
    names = [name for name, a in vars(cache).items() if name != "length" and a is not None]
    slots = {name: getattr(cache, name) + jnp.nan for name in names}
    return dataclasses.replace(cache, **slots)


@pytest.mark.parametrize("name", DECODED_ONE_BY_ONE)
def test_a_prompt_and_then_single_tokens_are_the_full_forward_pass(name, make_mixer):
    """As `generate` decodes: the prompt in one call, which ends within a block."""
    layers, x, prompt, steps = [make_mixer(CASES[name])], inputs(), 22, 4
    expected, _ = forward(layers, x, *one_document())
    caches = [layer.init_cache(BATCH, LENGTH) for layer in layers]
    y, caches = decode(layers, x[:, :prompt], caches, mode=Mode(prefill=True))
    parts = [y]
    for slot in range(prompt, prompt + steps):
        y, caches = decode(layers, x[:, slot : slot + 1], caches)
        parts.append(y)
    decoded = np.concatenate(parts, axis=2)
    np.testing.assert_allclose(decoded, expected[:, :, : prompt + steps], rtol=1e-4, atol=1e-5)


def test_a_future_token_changes_no_past_output(layers):
    x, changed = inputs(), inputs()
    changed[:, 21:] = 50 * inputs(seed=1)[:, 21:]
    y, _ = forward(layers, x, *one_document())
    other, _ = forward(layers, changed, *one_document())
    np.testing.assert_array_equal(y[:, :, :21], other[:, :, :21])
    assert (np.abs(y - other)[:, :, 21:].max(-1) > 1e-3).all()


def test_packed_documents_are_each_alone(layers):
    """With padding behind each, which gets nothing."""
    x, spans = inputs(), ((0, 13), (16, 38))
    y, _ = forward(layers, x, *documents(*spans))
    for start, stop in spans:
        alone = np.full_like(x, 100)
        alone[:, : stop - start] = x[:, start:stop]
        expected, _ = forward(layers, alone, *documents((0, stop - start)))
        np.testing.assert_allclose(
            y[:, :, start:stop], expected[:, :, : stop - start], rtol=1e-4, atol=1e-5
        )
    _, segment_ids = documents(*spans)
    assert (y[:, segment_ids == 0] == 0).all()


def test_padding_changes_nothing(layers):
    x, padded = inputs(), inputs()
    positions, segment_ids = documents((0, 13), (16, 38))
    padded[segment_ids == 0] = 100
    y, _ = forward(layers, x, positions, segment_ids)
    other, _ = forward(layers, padded, positions, segment_ids)
    np.testing.assert_array_equal(y, other)


def test_a_sliding_window_ends_where_it_says(make_mixer):
    """Query 20 sees 14 to 20: a change of token 13 does not reach it, one of token 14 does."""
    layers = [make_mixer(CASES["sliding window"])]
    y, _ = forward(layers, inputs(), *one_document())
    for token, reaches in ((13, False), (14, True)):
        changed = inputs()
        changed[:, token] += 1
        other, _ = forward(layers, changed, *one_document())
        assert (np.abs(y - other)[:, :, 20].max() > 1e-4) == reaches


def pooled(scores, pooling):
    return {"max": np.max, "lse": np.logaddexp.reduce, "mean": np.mean}[pooling](scores)


def rounded_to_8_bits(values):
    """To 127ths of the largest."""
    scale = np.abs(values).max() / 127
    return np.rint(values / scale) * scale


def blocks_of_query(scores, config):
    """The definition: forced blocks, then the best others; `scores` [tokens seen]."""
    own = (len(scores) - 1) // BLOCK_SIZE
    forced = {n for n in range(own + 1) if n > own - config.num_local_blocks}
    forced |= set(range(min(config.num_sink_blocks, own + 1)))
    others = {
        n: pooled(scores[n * BLOCK_SIZE : (n + 1) * BLOCK_SIZE], config.pooling)
        for n in range(own + 1)
        if n not in forced
    }
    best = sorted(others, key=others.__getitem__, reverse=True)[: config.top_k - len(forced)]
    ids = sorted(forced | set(best))
    return ids + [-1] * (config.top_k - len(ids))


def test_learned_selection_is_that_of_its_config(make_mixer):
    """Pooling and forced blocks, from the index queries and keys by the definition."""
    x, (positions, segment_ids) = inputs(), one_document()
    branch = make_mixer(MSA).index
    assert isinstance(branch, IndexBranch)
    index_q, index_k = map(np.asarray, jax.jit(lambda *a: a[0](*a[1:]))(branch, x, positions))
    chosen = []
    eight_bit_q = np.apply_along_axis(rounded_to_8_bits, -1, index_q)
    eight_bit_k = np.array(index_k)
    for b, start in np.ndindex(BATCH, -(-LENGTH // BLOCK_SIZE)):
        block = slice(start * BLOCK_SIZE, (start + 1) * BLOCK_SIZE)
        eight_bit_k[b, block] = rounded_to_8_bits(index_k[b, block])
    names = "max pooling", "lse pooling", "mean pooling", "local and sink blocks", "8-bit index"
    for name in names:
        config = CASES[name]
        if config.index_precision == "int8":
            index_q, index_k = eight_bit_q, eight_bit_k
        _, block_ids = forward([make_mixer(config)], x, positions, segment_ids)
        for b, r, t in np.ndindex(BATCH, MSA.num_kv_heads, LENGTH):
            scores = index_k[b, : t + 1] @ index_q[b, t, r] / np.sqrt(MSA.index_dim)
            assert block_ids[b, r, t].tolist() == blocks_of_query(scores, config), name
        chosen.append(block_ids.tolist())
    assert all(a != b for i, a in enumerate(chosen) for b in chosen[:i])
