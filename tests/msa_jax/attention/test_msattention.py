"""MSAttention against dense attention, and the KL against numpy: its value, and whom it teaches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from msa_jax.attention import GQAttention, Mode, MSAttention, msa
from msa_jax.config import AttentionConfig

BATCH, LENGTH, D_MODEL = 2, 24, 12
CONFIG = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    rope_theta=100.0,
    block_size=4,
    top_k=3,
    index_dim=6,
)
INDEX_PARAMETERS = {".k", ".q", ".k_norm.weight", ".q_norm.weight"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnames="mode")
def run(layer, x, segment_ids=None, mode=Mode()):
    return layer(x, segment_ids=segment_ids, mode=mode)


@pytest.fixture(scope="module")
def make_layer(filled):
    def make(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        cls = MSAttention if config.kind == "msa" else GQAttention
        return filled(lambda rngs: cls(config, D_MODEL, rngs=rngs))

    return make


def inputs():
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, D_MODEL))
    return jnp.asarray(x, jnp.float32)


def dense_twin(layer, make_layer):
    """Dense attention with the same main weights."""
    dense = make_layer(kind="gqa")
    dense.main = layer.main
    return dense


@pytest.mark.fast
def test_selecting_every_block_is_dense_attention_in_value_and_gradients(make_layer):
    out_weights = np.random.default_rng(2).normal(size=(BATCH, LENGTH, D_MODEL))

    @jax.jit
    def gradients(layer, x):
        return jax.value_and_grad(
            lambda layer, x: (layer(x).y * out_weights).sum(), argnums=(0, 1)
        )(layer, x)

    covering = make_layer(top_k=LENGTH // CONFIG.block_size)
    dense, x = dense_twin(covering, make_layer), inputs()
    expected, (dense_gradient, dense_dx) = gradients(dense, x)
    actual, (gradient, dx) = gradients(covering, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    leaves = jax.tree.leaves((dense_gradient.main, dense_dx))
    assert len(leaves) == 7  # q, k, v, o, both norms and x
    for actual, expected in zip(jax.tree.leaves((gradient.main, dx)), leaves, strict=True):
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_early_queries_and_the_warm_up_phase_attend_densely(make_layer):
    """Early: while no more than top_k blocks are visible."""
    layer, x = make_layer(), inputs()
    expected = np.asarray(run(dense_twin(layer, make_layer), x).y)
    sparse = np.asarray(run(layer, x).y)
    early = CONFIG.top_k * CONFIG.block_size
    np.testing.assert_allclose(sparse[:, :early], expected[:, :early], rtol=1e-4, atol=1e-5)
    assert np.abs(sparse - expected)[:, early:].max() > 0.01
    # Also while the selection that is not yet used is looked at.
    warmup = run(layer, x, mode=Mode(phase="warmup", losses=True, selections=True))
    np.testing.assert_allclose(warmup.y, expected, rtol=1e-4, atol=1e-5)
    assert "block_ids" in warmup.aux


def test_warm_up_is_one_dense_call_that_gives_the_log_sum_exp_too(make_layer, monkeypatch):
    calls = []

    def dense_attention(*arrays, **options):
        calls.append(options)
        return pallas_kernels.dense_attention(*arrays, **options)

    monkeypatch.setattr(msa, "dense_attention", dense_attention)
    monkeypatch.setattr(msa, "sparse_attention", None)
    jax.eval_shape(functools.partial(make_layer(), mode=Mode("warmup", losses=True)), inputs())
    assert [call["return_lse"] for call in calls] == [True]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def divergences(layer, x, block_ids, segment_ids):
    """KL(teacher || student) of every real query and group, from the layer's own heads."""
    batch, length = x.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    @jax.jit
    def branches(layer, x):
        return layer.main.heads(x, positions)[:2], layer.index(x, positions)

    (q, k), (index_q, index_k) = jax.tree.map(np.asarray, branches(layer, x))
    per_group = CONFIG.num_heads // CONFIG.num_kv_heads
    values = []
    for b, r, t in np.ndindex(batch, CONFIG.num_kv_heads, length):
        if segment_ids[b, t] == 0:
            continue
        seen = np.arange(t + 1)
        if block_ids is not None:
            seen = seen[np.isin(seen // CONFIG.block_size, block_ids[b, r, t])]
        heads = range(r * per_group, (r + 1) * per_group)
        scale = CONFIG.head_dim**-0.5
        teacher = np.mean([softmax(k[b, seen, r] @ q[b, t, h] * scale) for h in heads], axis=0)
        student = softmax(index_k[b, seen] @ index_q[b, t, r] * CONFIG.index_dim**-0.5)
        values.append((teacher * np.log(teacher / student)).sum())
    return np.array(values)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_kl_is_the_mean_over_real_queries_and_groups(phase, make_layer):
    """Over the selected tokens, in warm-up over all: the two differ."""
    layer, x = make_layer(), inputs()
    segment_ids = jnp.ones((BATCH, LENGTH), jnp.int32).at[1, 17:].set(0)
    mode = Mode(phase=phase, losses=True, selections=True)
    aux = run(layer, x, segment_ids, mode=mode).aux
    support = None if phase == "warmup" else np.asarray(aux["block_ids"])
    kl = divergences(layer, x, support, segment_ids)
    assert len(kl) == CONFIG.num_kv_heads * (LENGTH + 17)
    assert kl.mean() > 0.01
    np.testing.assert_allclose(aux["index_kl"], kl.mean(), rtol=1e-4)
    if phase == "warmup":
        selected = divergences(layer, x, np.asarray(aux["block_ids"]), segment_ids)
        assert abs(selected.mean() / kl.mean() - 1) > 1e-3


def test_kl_without_padding_is_the_same_mean(make_layer):
    layer, x = make_layer(), inputs()
    aux = run(layer, x, mode=Mode(losses=True, selections=True)).aux
    kl = divergences(layer, x, np.asarray(aux["block_ids"]), np.ones((BATCH, LENGTH)))
    np.testing.assert_allclose(aux["index_kl"], kl.mean(), rtol=1e-4)


def reached(gradient):
    """Names of the variables with a gradient other than 0."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradient)
    return {
        jax.tree_util.keystr(path).removesuffix(".value"): True
        for path, leaf in leaves
        if np.abs(leaf).max() > 0
    }.keys()


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_kl_teaches_the_index_branch_alone_and_the_output_all_the_rest(phase, make_layer):
    @jax.jit
    def gradients(layer, x):
        def losses(layer, x):
            output = layer(x, mode=Mode(phase=phase, losses=True))
            return (output.y**2).sum(), output.aux["index_kl"]

        return [jax.grad(lambda *a, i=i: losses(*a)[i], argnums=(0, 1))(layer, x) for i in range(2)]

    language, alignment = gradients(make_layer(), inputs())
    index = {f"[0].index{name}" for name in INDEX_PARAMETERS}
    assert reached(alignment) == index
    main = {f"[0].main{name}" for name in INDEX_PARAMETERS | {".v", ".o"}}
    assert reached(language) == main | {"[1]"}


def test_without_the_detachment_the_kl_reaches_the_input(make_layer):
    layer = make_layer(detach_index_input=False)
    gradient = jax.jit(jax.grad(lambda x: run(layer, x, mode=Mode(losses=True)).aux["index_kl"]))(
        inputs()
    )
    assert np.abs(gradient).max() > 1e-4


def test_only_a_learned_selection_has_an_index_branch(make_layer):
    layer = make_layer(selector="strided")
    assert layer.index is None
    assert layer.init_cache(1, 4).index_k is None
    aux = jax.eval_shape(lambda x: layer(x, mode=Mode(losses=True, diagnostics=True)), inputs()).aux
    assert "index_kl" not in aux
    assert "block_recall" in aux


def test_a_layer_that_reuses_a_selection_needs_one_and_reports_nothing(filled, make_layer):
    layer = filled(lambda rngs: MSAttention(CONFIG, D_MODEL, computes_selection=False, rngs=rngs))
    assert layer.index is None
    with pytest.raises(ValueError, match=r"shared=None: .* pass its MixerOutput.shared"):
        layer(inputs())
    mode = Mode(losses=True, diagnostics=True, selections=True)

    def call(layer, x):
        lower = make_layer()(x)
        return lower.shared, layer(x, shared=lower.shared, mode=mode)

    lent, output = jax.eval_shape(call, layer, inputs())
    assert output.aux == {}
    assert output.shared == lent


def test_a_packed_batch_has_no_place_in_a_cache(make_layer):
    for kind in ("msa", "gqa"):
        layer = make_layer(kind=kind)
        segment_ids = jnp.ones((BATCH, LENGTH), jnp.int32)
        with pytest.raises(ValueError, match="one document per row; pad prompts on the right"):
            layer(inputs(), segment_ids=segment_ids, cache=layer.init_cache(BATCH, LENGTH))


def test_left_padding_is_an_error_and_no_silent_shift(make_layer):
    segment_ids = jnp.ones((BATCH, LENGTH), jnp.int32).at[0, :3].set(0)
    with pytest.raises(ValueError, match="this is left padding: pad on the right"):
        make_layer()(inputs(), segment_ids=segment_ids)
