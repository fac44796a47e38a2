"""The transformer: stages, scan and rematerialisation change no number; dtypes; who learns what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from msa_jax.attention import Mode
from msa_jax.attention.mixer import BLOCK_IDS
from msa_jax.config import (
    ArchitectureConfig,
    AttentionConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
)
from msa_jax.model import (
    LayerKind,
    Transformer,
    plan_stages,
    remat_policy,
    require_vocabulary,
)
from pallas_kernels import BlockSelection, select_blocks, sparse_attention

BATCH, LENGTH, VOCAB, EXPERTS = 2, 24, 17, 4
BLOCK_SIZE = 4
ATTENTION = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    rope_theta=100.0,
    block_size=BLOCK_SIZE,
    top_k=2,
    index_dim=4,
)
MODEL = ModelConfig(vocab_size=VOCAB, d_model=12, num_layers=2, ffn_dim=10, compute_dtype="float32")
UNIFORM = ArchitectureConfig(
    MODEL, ATTENTION, MoEConfig(num_experts=EXPERTS, top_k=2, expert_dim=5)
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def changed(config, *, attention=None, moe=None, **model):
    """The config with other fields in its sections."""
    return ArchitectureConfig(
        dataclasses.replace(config.model, **model),
        dataclasses.replace(config.attention, **attention or {}),
        dataclasses.replace(config.moe, **moe or {}),
    )


# Experts cost half of a gradient's compilation; tests of sharding take theirs, rematerialised.
WITHOUT_EXPERTS = changed(UNIFORM, moe={"num_experts": 0})
# Layer 0 is dense throughout; 1-2 and 3-4 share a selection, 5 is left over.
MIXED = changed(
    UNIFORM,
    num_layers=6,
    num_dense_layers=1,
    num_full_attention_layers=1,
    attention={"share_every": 2},
)


@pytest.fixture(scope="module")
def make_model(filled):
    return lambda config: filled(lambda rngs: Transformer(config, rngs=rngs))


@functools.partial(jax.jit, static_argnames="mode")
def forward(model, tokens, positions, segment_ids, mode=Mode(losses=True, selections=True)):
    return model(tokens, positions=positions, segment_ids=segment_ids, mode=mode)


def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def documents(*spans):
    """Positions and segment ids of documents at (start, stop), padding elsewhere."""
    positions = np.zeros((BATCH, LENGTH), np.int32)
    segment_ids = np.zeros((BATCH, LENGTH), np.int32)
    for number, (start, stop) in enumerate(spans):
        segment_ids[:, start:stop] = number + 1
        positions[:, start:stop] = np.arange(stop - start)
    return positions, segment_ids


def assert_trees_close(actual, expected, **tolerances):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, **tolerances, err_msg=jax.tree_util.keystr(path))


def shape_of_plan(config):
    return [(len(stage.kinds), stage.repeats) for stage in plan_stages(config)]


@pytest.mark.parametrize(
    ("model", "attention", "plan"),
    [
        ({"num_layers": 60, "num_dense_layers": 3, "num_full_attention_layers": 3}, {}, [3, 57]),
        ({"num_layers": 41, "num_dense_layers": 3}, {}, [3, 38]),
        ({"num_layers": 16}, {}, [16]),
        ({"num_layers": 8}, {"share_every": 4}, [(4, 2)]),
        ({"num_layers": 9}, {"share_every": 4}, [(4, 2), 1]),
        ({"num_layers": 3}, {"share_every": 4}, [(3, 1)]),
        ({"num_layers": 7, "num_dense_layers": 1}, {"share_every": 3}, [(3, 1), (3, 1), 1]),
        ({"num_layers": 6, "num_full_attention_layers": 1}, {"share_every": 2}, [1, (2, 2), 1]),
        ({"num_layers": 5}, {"kind": "gqa", "share_every": 4}, [5]),
    ],
)
def test_equal_neighbours_form_stages(model, attention, plan):
    config = changed(UNIFORM, **model, attention=attention)
    assert shape_of_plan(config) == [
        part if isinstance(part, tuple) else (1, part) for part in plan
    ]
    kinds = [kind for stage in plan_stages(config) for kind in stage.kinds * stage.repeats]
    assert kinds == [
        LayerKind(
            config.attention_of(layer), config.computes_selection(layer), config.has_experts(layer)
        )
        for layer in range(config.model.num_layers)
    ]


def layer_by_layer(model, tokens, positions, segment_ids, mode):
    """The model as a plain loop over its layers: logits, and what each layer reports."""
    x, shared, reports = model.embedding.encode(tokens), None, []
    for stage, groups in zip(model.plan, model.stages, strict=True):
        for repeat in range(stage.repeats):
            for block in jax.tree.map(lambda a, r=repeat: a[r], groups):
                x, _, shared, aux = block(
                    x,
                    positions=positions,
                    segment_ids=segment_ids,
                    cache=None,
                    shared=shared,
                    mode=mode,
                )
                reports.append(aux)
    return model.embedding.decode(model.final_norm(x)), reports


@pytest.fixture(scope="module")
def mixed(make_model):
    return make_model(MIXED)


@pytest.fixture(scope="module")
def mixed_output(mixed):
    return forward(mixed, tokens(), *documents((0, LENGTH)))


@pytest.mark.fast
def test_scan_unrolled_and_a_plain_loop_agree(make_model, mixed_output):
    """In logits and in every report, in the order of the layers."""
    unrolled = make_model(changed(MIXED, scan_layers=False))
    mode = Mode(losses=True, selections=True)

    @jax.jit
    def run(model, *arguments):
        output = model(arguments[0], positions=arguments[1], segment_ids=arguments[2], mode=mode)
        return output, layer_by_layer(model, *arguments, mode)

    output, (logits, reports) = run(unrolled, tokens(), *documents((0, LENGTH)))
    assert_trees_close(output, mixed_output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, mixed_output.logits, rtol=1e-4, atol=1e-5)
    layers = {
        "index_kl": [1, 3, 5],
        "block_ids": [1, 3, 5],
        "expert_load": [1, 2, 3, 4, 5],
        "router_entropy": [1, 2, 3, 4, 5],
        "dropped_tokens": [1, 2, 3, 4, 5],
    }
    assert mixed_output.aux.keys() == layers.keys()
    for name, array in mixed_output.aux.items():
        assert [layer for layer, aux in enumerate(reports) if name in aux] == layers[name]
        expected = np.stack([aux[name] for aux in reports if name in aux])
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert len(np.unique(mixed_output.aux["index_kl"])) == 3


def test_packed_documents_are_each_alone(mixed):
    spans = ((0, 7), (8, 22))
    packed, _, _ = forward(mixed, tokens(), *documents(*spans))
    for start, stop in spans:
        alone = np.zeros_like(tokens())
        alone[:, : stop - start] = tokens()[:, start:stop]
        expected, _, _ = forward(mixed, alone, *documents((0, stop - start)))
        np.testing.assert_allclose(
            packed[:, start:stop], expected[:, : stop - start], rtol=1e-4, atol=1e-5
        )


def test_cached_decoding_is_the_full_forward_pass(mixed, mixed_output):
    """Through stages of one and of several layers, without positions given."""
    decode = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    cache, logits = mixed.init_cache(BATCH, LENGTH + 1), []
    for start in range(0, LENGTH, 3):
        output = decode(mixed, tokens()[:, start : start + 3], cache)
        logits.append(np.asarray(output.logits))
        cache = output.cache
    np.testing.assert_allclose(
        np.concatenate(logits, axis=1), mixed_output.logits, rtol=1e-4, atol=1e-5
    )
    assert mixed_output.cache is None


def losses_and_gradients(model, *weights):
    """A (language, alignment) pair of losses, and the gradient of each weighted sum of the two."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    positions, segment_ids = map(jnp.asarray, documents((0, 10), (12, LENGTH)))
    out_weights = np.random.default_rng(3).normal(size=(BATCH, LENGTH, VOCAB))

    @jax.jit
    def run(params, rest, tokens):
        def losses(params):
            output = nnx.merge(graph, params, rest)(
                tokens, positions=positions, segment_ids=segment_ids, mode=Mode(losses=True)
            )
            return (output.logits * out_weights).sum(), output.aux["index_kl"].sum()

        values, pull_back = jax.vjp(losses, params)
        return values, [pull_back(tuple(map(jnp.float32, pair)))[0] for pair in weights]

    return run(params, rest, tokens())


@pytest.fixture(scope="module")
def expected_gradients(make_model):
    return losses_and_gradients(make_model(WITHOUT_EXPERTS), (1, 0), (0, 1))


@pytest.mark.parametrize(
    "model",
    [
        {"remat": "full"},
        {"remat": "save_selection"},
        {"remat": "attention"},
        {"remat": "dots"},
        {"scan_layers": False},
    ],
    ids=["full", "save_selection", "attention", "dots", "unrolled"],
)
def test_rematerialised_and_unrolled_gradients_are_the_same(model, make_model, expected_gradients):
    values, (gradient,) = losses_and_gradients(
        make_model(changed(WITHOUT_EXPERTS, **model)), (1, 1)
    )
    expected, (language, alignment) = expected_gradients
    assert_trees_close(values, expected, rtol=1e-5)
    assert_trees_close(gradient, jax.tree.map(np.add, language, alignment), rtol=1e-4, atol=1e-4)


def reached(gradient):
    """Paths of the parameters with a gradient other than 0."""
    return {
        "/".join(map(str, path))
        for path, param in nnx.to_flat_state(gradient)
        if np.abs(param.get_value()).max() > 0
    }


def test_the_kl_teaches_the_index_branches_and_the_language_loss_the_rest(expected_gradients):
    """In every layer, through the whole model."""
    _, (language, alignment) = expected_gradients
    everything = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(language)}
    index = {path for path in everything if "/mixer/index/" in path}
    assert len(index) == 4
    assert reached(alignment) == index
    assert reached(language) == everything - index
    per_layer = alignment.stages[0][0].mixer.index.q.get_value()
    assert (np.abs(per_layer).max((1, 2, 3)) > 0).all()


def test_without_the_detachment_the_kl_reaches_the_rest(make_model, expected_gradients):
    """The same losses; now the embedding and the main branch below another layer's get some."""
    config = changed(WITHOUT_EXPERTS, attention={"detach_index_input": False})
    losses, (alignment,) = losses_and_gradients(make_model(config), (0, 1))
    assert_trees_close(losses, expected_gradients[0], rtol=1e-5)
    assert {"embedding/table", "stages/0/0/mixer/main/v", "stages/0/0/mixer_norm/weight"} <= (
        reached(alignment)
    )


@pytest.mark.parametrize(
    ("remat", "selections"),
    [("none", 1), ("dots", 1), ("full", 2), ("save_selection", 1), ("attention", 1)],
)
def test_what_the_backward_pass_recomputes(remat, selections):
    """Counted by top-k, which has no gradient: it runs again unless the block ids were kept."""
    config = changed(WITHOUT_EXPERTS, remat=remat)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

    def loss(model, tokens):
        output = model(tokens, mode=Mode(losses=True))
        return output.logits.sum() + output.aux["index_kl"].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(model, tokens())
    assert str(jaxpr).count(" top_k[") == selections


def test_which_residuals_the_selection_policy_keeps():
    """Layer input, block ids and log-sum-exp; of the attention output's size nothing but the input.

    The log-sum-exp has a use in the backward pass only where a kernel's gradient or the KL reads
    it, so here a loss does.
    """

    def layer(remat):
        def attend(q, k, v):
            selection = select_blocks(q[:, :, :2], k[:, :, 0], block_size=4, top_k=2)
            ids = checkpoint_name(selection.block_ids, BLOCK_IDS)
            o, lse = sparse_attention(q, k, v, BlockSelection(ids, 4))
            return (jnp.sin(o) * jnp.sin(lse).sum()).sum()

        return jax.checkpoint(attend, policy=remat_policy(remat))

    q, k = (jnp.ones((1, 12, heads, 8)) for heads in (4, 2))
    kept = {}
    for remat in ("full", "save_selection", "attention"):
        _, pullback = jax.vjp(layer(remat), q, k, k)
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(pullback))
        for array in (q, k, k):
            shapes.remove(array.shape)
        kept[remat] = shapes
    assert kept["full"] == []
    assert kept["save_selection"] == [(1, 2, 12, 2), (1, 4, 12)]
    assert kept["attention"] == [(1, 2, 12, 2), (1, 4, 12), (1, 12, 4, 8)]


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_activations_float32_logits_and_parameters(tied):
    config = changed(MIXED, compute_dtype="bfloat16", tie_embeddings=tied)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {"float32"}
    assert (model.embedding.head is None) == tied

    def run(model, tokens):
        x = model.embedding.encode(tokens)
        (block,) = jax.tree.map(lambda a: a[0], model.stages[0])
        nothing = dict.fromkeys(("positions", "segment_ids", "cache", "shared"))
        activations = block(x, **nothing, mode=Mode())[0]
        mode = Mode(losses=True, diagnostics=True)
        output = model(tokens, cache=model.init_cache(BATCH, LENGTH), mode=mode)
        cache = output.cache[1][0]
        return (activations, cache.k, cache.v, cache.index_k), (output.logits, output.aux)

    narrow, wide = jax.eval_shape(run, model, jnp.zeros((BATCH, LENGTH), jnp.int32))
    assert {str(array.dtype) for array in narrow} == {"bfloat16"}
    assert {str(array.dtype) for array in jax.tree.leaves(wide)} == {"float32"}

    gradient = jax.eval_shape(
        jax.grad(lambda model, tokens: model(tokens).logits.sum()), model, tokens()
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_steps_through_with_jit_off(make_model):
    """The unrolled path, so that a debugger sees numbers in every layer."""
    plain = {"qk_norm": False, "index_norm": False, "rope_dim": 0, "top_k": 1}
    config = changed(WITHOUT_EXPERTS, num_layers=1, scan_layers=False, attention=plain)
    model = make_model(config)
    short = tokens()[:1, :8]
    expected = jax.jit(lambda model, tokens: model(tokens).logits)(model, short)
    with jax.disable_jit():
        logits = model(jnp.asarray(short)).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_fresh_layers_differ_and_their_outputs_start_small():
    """Two branches per layer add to the residual stream, so each starts at 1 / sqrt(2 layers)."""
    make = jax.jit(lambda key: Transformer(UNIFORM, rngs=nnx.Rngs(key)))
    model = make(jax.random.key(0))
    (block,) = model.stages[0]
    for param in jax.tree.leaves((block.mixer.main.q, block.feed_forward.gate)):
        assert np.abs(param[0] - param[1]).min() > 0
    fan_in = ATTENTION.num_heads * ATTENTION.head_dim
    assert np.std(block.mixer.main.o[...]) == pytest.approx(1 / np.sqrt(4 * fan_in), rel=0.1)
    assert np.std(block.mixer.main.q[...]) == pytest.approx(1 / np.sqrt(12), rel=0.1)
    other = make(jax.random.key(1))
    assert np.abs(other.embedding.table[...] - model.embedding.table[...]).min() > 0


def test_left_padding_is_an_error(make_model):
    _, segment_ids = documents((3, LENGTH))
    with pytest.raises(ValueError, match="this is left padding: pad on the right"):
        make_model(UNIFORM)(jnp.asarray(tokens()), segment_ids=jnp.asarray(segment_ids))


def test_a_vocabulary_that_does_not_fit_names_the_field():
    require_vocabulary(UNIFORM, VOCAB)
    with pytest.raises(ConfigError, match=r"model.vocab_size=17: the tokenizer has 18 ids; set"):
        require_vocabulary(UNIFORM, VOCAB + 1)
