"""The baselines and the fixed selectors by their definitions: which tokens reach which."""

import dataclasses

import jax
import numpy as np
import pytest

from msa_jax.attention import GQAttention, Mode, MSAttention, PatternAttention, build_mixer
from msa_jax.config import AttentionConfig, ConfigError

LENGTH, D_MODEL, BLOCK_SIZE, WINDOW = 40, 12, 4, 7
MSA = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    rope_theta=100.0,
    block_size=BLOCK_SIZE,
    top_k=4,
    index_dim=4,
)


def msa(**changes):
    return dataclasses.replace(MSA, **changes)


KINDS = {
    "gqa": msa(kind="gqa"),
    "mha": msa(kind="mha"),
    "sliding_window": msa(kind="sliding_window", window=WINDOW),
    "longformer": msa(kind="longformer", num_sink_blocks=2),
    "bigbird": msa(kind="bigbird", top_k=6, num_sink_blocks=1, num_random_blocks=2),
}
SELECTORS = {
    "strided": msa(selector="strided"),
    "random": msa(selector="random"),
    "sink_window": msa(selector="sink_window", num_sink_blocks=2),
    "oracle": msa(selector="oracle"),
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def make(filled):
    def make(config):
        def build(rngs):
            return build_mixer(config, D_MODEL, computes_selection=True, rngs=rngs)

        return filled(build)

    return make


def inputs():
    """Rows that differ from the last in one token each: row i in token i, the last in none."""
    x = np.random.default_rng(0).normal(size=(LENGTH, D_MODEL)).astype(np.float32)
    rows = np.repeat(x[None], LENGTH + 1, axis=0)
    rows[np.arange(LENGTH), np.arange(LENGTH)] += 1
    return rows


@jax.jit
def run(layer, x):
    """The output and, of a layer that selects, the block ids."""
    mixed = layer(x, mode=Mode(selections=True))
    return mixed.y, mixed.aux.get("block_ids")


def reach(outputs):
    """[T, T]: whether the output of a token, its row, changed with the input of another."""
    y = np.asarray(outputs)
    return np.abs(y[:-1] - y[-1]).max(-1).T > 1e-5


def mask_of(sees):
    mask = np.zeros((LENGTH, LENGTH), bool)
    for query, key in np.ndindex(LENGTH, LENGTH):
        mask[query, key] = key <= query and sees(query, key)
    return mask


def near_or_sink(num_sinks, num_near):
    """Token visibility by the blocks of query and key."""

    def sees(query, key):
        block, own = key // BLOCK_SIZE, query // BLOCK_SIZE
        return block < num_sinks or own - block < num_near

    return sees


MASKS = {
    "gqa": lambda query, key: True,
    "mha": lambda query, key: True,
    "sliding_window": lambda query, key: query - key < WINDOW,
    "longformer": near_or_sink(2, 2),
    "sink_window": near_or_sink(2, 2),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_token_is_reached_by_those_that_its_pattern_names(name, make):
    layer = make((KINDS | SELECTORS)[name])
    np.testing.assert_array_equal(reach(run(layer, inputs())[0]), mask_of(MASKS[name]))


@pytest.mark.parametrize("name", ["bigbird", "strided", "random"])
def test_a_token_is_reached_by_the_blocks_that_are_reported(name, make):
    """By any group: each has its own. (What the oracle picks depends on the tokens.)"""
    y, block_ids = run(make((KINDS | SELECTORS)[name]), inputs())
    ids = np.asarray(block_ids)[0]
    mask = mask_of(lambda query, key: (ids[:, query] == key // BLOCK_SIZE).any())
    np.testing.assert_array_equal(reach(y), mask)
    assert mask.sum() < LENGTH * (LENGTH + 1) // 2


def test_bigbird_sees_sinks_and_window_and_random_blocks_shared_by_a_block_of_queries(make):
    config = KINDS["bigbird"]
    ids = np.asarray(run(make(config), inputs())[1])[0]
    near = config.top_k - config.num_sink_blocks - config.num_random_blocks
    drawn = set()
    for group, query in np.ndindex(config.num_kv_heads, LENGTH):
        own = query // BLOCK_SIZE
        chosen = set(ids[group, query].tolist()) - {-1}
        always = {n for n in range(own + 1) if n < config.num_sink_blocks or own - n < near}
        assert always <= chosen <= set(range(own + 1))
        free = own + 1 - len(always)
        assert len(chosen - always) == min(free, config.num_random_blocks)
        assert chosen == set(ids[group, own * BLOCK_SIZE].tolist()) - {-1}
        if free > config.num_random_blocks:
            drawn.add((group, own, *sorted(chosen - always)))
    by_group = [{pick[1:] for pick in drawn if pick[0] == group} for group in range(2)]
    assert by_group[0] != by_group[1], "groups draw alike"
    assert len({pick[2:] for pick in drawn}) > 2, "blocks of queries draw alike"


@pytest.mark.parametrize(
    ("covering", "same"),
    [
        (msa(kind="sliding_window", window=LENGTH), "gqa"),
        (msa(kind="longformer", top_k=10, num_sink_blocks=1), "gqa"),
        (msa(kind="bigbird", top_k=10, num_sink_blocks=1, num_random_blocks=8), "gqa"),
        (msa(selector="sink_window", top_k=10, num_sink_blocks=1), "gqa"),
        (msa(selector="sink_window", num_sink_blocks=2), "longformer"),
    ],
    ids=["sliding_window", "longformer", "bigbird", "sink_window", "longformer as a selector"],
)
def test_what_sees_everything_is_dense_attention(covering, same, make):
    """Of equal weights, which differ in no name or shape; and Longformer is a selector of MSA."""
    expected, _ = run(make(KINDS[same]), inputs())
    np.testing.assert_allclose(run(make(covering), inputs())[0], expected, rtol=1e-4, atol=1e-5)


def test_multi_head_attention_is_gqa_with_a_kv_head_for_each_query_head(make):
    mha = make(KINDS["mha"])
    assert mha.main.k.shape == mha.main.v.shape == mha.main.q.shape == (D_MODEL, 4, 8)
    assert mha.init_cache(1, 3).k.shape == (1, 3, 4, 8)
    expected, _ = run(make(msa(kind="gqa", num_kv_heads=4)), inputs())
    np.testing.assert_array_equal(run(mha, inputs())[0], expected)
    assert make(msa(kind="mha", num_kv_heads=3)).main.k.shape == mha.main.k.shape


@pytest.mark.parametrize("name", SELECTORS)
def test_every_parameter_and_the_input_get_a_gradient(name, make):
    """Of the kinds, a training step says so of the whole model: `test_baseline_steps.py`."""
    layer = make(SELECTORS[name])
    gradients = jax.jit(jax.grad(lambda *a: (a[0](a[1]).y ** 2).sum(), argnums=(0, 1)))(
        layer, inputs()[:1]
    )
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == 7  # q, k, v, o, two norms and x: no index branch
    for leaf in leaves:
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 1e-4


def test_each_kind_has_its_mixer(make):
    classes = {name: type(make(config)) for name, config in (KINDS | SELECTORS).items()}
    dense, patterns = ("gqa", "mha", "sliding_window"), ("longformer", "bigbird")
    assert classes == (
        dict.fromkeys(dense, GQAttention)
        | dict.fromkeys(patterns, PatternAttention)
        | dict.fromkeys(SELECTORS, MSAttention)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sliding_window"}, r'window=0: must be >= 1 for kind="sliding_window"'),
        ({"kind": "sliding_window", "window": -1}, r"window=-1: must be >= 1"),
        ({"kind": "gqa", "window": 8}, r'window=8: must be 0 for kind="gqa"; .*"sliding_window"'),
        ({"window": 8}, r'window=8: must be 0 for kind="msa"'),
        ({"kind": "bigbird", "num_sink_blocks": 1}, r"num_random_blocks=0: must be >= 1"),
        ({"num_random_blocks": 1}, r'num_random_blocks=1: must be 0 for kind="msa"; .*"bigbird"'),
        ({"kind": "longformer"}, r'num_sink_blocks=0: must be >= 1 for "longformer"'),
        ({"kind": "bigbird", "num_random_blocks": 1}, r"num_sink_blocks=0: must be >= 1"),
        ({"selector": "sink_window"}, r'num_sink_blocks=0: must be >= 1 for "sink_window"'),
        ({"num_sink_blocks": -1}, r'num_sink_blocks=-1: must be >= 0 for "learned"'),
        (
            {"kind": "bigbird", "num_sink_blocks": 2, "num_random_blocks": 2},
            r"top_k=4: must hold the 5 forced blocks",
        ),
        ({"kind": "longformer", "num_sink_blocks": 4}, r"top_k=4: must hold the 5 forced blocks"),
        ({"num_kv_heads": 3}, r"num_kv_heads=3: must divide attention\.num_heads=4"),
    ],
)
def test_fields_that_do_not_suit_the_kind_are_one_clear_error(changes, message):
    with pytest.raises(ConfigError, match=rf"^attention\.{message}"):
        msa(**changes)


@pytest.mark.parametrize("name", KINDS)
def test_the_dense_counterpart_sees_everything_and_keeps_the_heads(name):
    config = KINDS[name]
    dense = config.dense
    assert dense.kind == ("mha" if name == "mha" else "gqa")
    assert (dense.window, dense.num_random_blocks, dense.kv_heads) == (0, 0, config.kv_heads)
    assert dense.dense is dense
    assert (dense == config) == (name in ("gqa", "mha"))
