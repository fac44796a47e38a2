"""The training step: its gradient term by term, accumulation, phases, balance, and NaNs.

With clipping off, Adam's first moment after the first step is (1 - b1) times the gradient: so the
tests read the gradient from the state, where an update would show little but its sign.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax.attention import Mode
from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig
from msa_jax.model import plan_stages
from msa_jax.sharding import MESH_AXES, make_mesh, place_batch
from msa_jax.train.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
)
from msa_jax.train.optimizer import make_schedule
from msa_jax.train.state import TrainState, abstract_model, abstract_state, model_graph
from msa_jax.train.step import balance_experts, make_eval_step, make_train_step

ROWS, LENGTH, VOCAB = 16, 16, 12
# Layer 0: MSA and a dense feed-forward. Layer 1: MSA and experts.
CONFIG = ExperimentConfig(
    ModelConfig(
        vocab_size=VOCAB,
        d_model=8,
        num_layers=2,
        num_dense_layers=1,
        ffn_dim=6,
        compute_dtype="float32",
    ),
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
    MoEConfig(num_experts=4, top_k=2, expert_dim=6, num_shared_experts=0),
    data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
    optimizer=OptimizerConfig(warmup_steps=3, learning_rate=0.03, gradient_clip=0.0),
    train=TrainConfig(steps=40),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def changed(config=CONFIG, **sections):
    """The config with other fields in its sections."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


SOFTMAX = changed(moe={"router": "softmax", "balance_weight": 0.0})


def mesh_of(**changes):
    sizes = dict.fromkeys(MESH_AXES, 1) | changes
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def state_of(config, mesh, seed=0):
    """A state with random parameters and selection biases; compiles nothing."""
    rng = np.random.default_rng(seed)
    abstract = abstract_state(config, mesh)

    def put(tree, scale):
        return jax.tree.map(
            lambda leaf: jax.device_put(
                (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding
            ),
            tree,
        )

    return TrainState(
        put(abstract.step, 0),
        put(abstract.params, 0.3),
        put(abstract.variables, 0.1),
        put(abstract.opt_state, 0),
    )


def batch():
    """Ragged: micro-batches (every 4th row) have different counts; those of rows 3, 7, .. none."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segment_ids = np.ones((ROWS, LENGTH), np.int32)
    segment_ids[::2, 8:] = 2
    for row in range(ROWS):
        segment_ids[row, LENGTH - (row % 4) * 3 :] = 0
    segment_ids[3::4] = 0
    position = np.arange(LENGTH, dtype=np.int32)
    loss_mask = (segment_ids > 0) & (rng.random((ROWS, LENGTH)) < 0.7)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segment_ids,
        "positions": np.where(segment_ids == 2, position - 8, position),
        "loss_mask": loss_mask.astype(np.int32),
    }


compiled_step = functools.cache(make_train_step)


def run_step(config, state, *, phase="sparse", steps=1, mesh=None):
    """The state, and the metrics of each step, after some steps on the one batch."""
    mesh = mesh_of() if mesh is None else mesh
    records = []
    with jax.set_mesh(mesh):
        step, placed = compiled_step(config), place_batch(batch(), mesh)
        for _ in range(steps):
            state, metrics = step(state, placed, phase)
            records.append(jax.device_get(metrics))
    return state, records


def on_host(tree):
    return jax.tree.map(np.array, tree)


def by_path(tree):
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def gradient_in(state):
    """What the first step's gradient was, by parameter."""
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    assert adam.count == 1
    return {path: np.asarray(mu) / (1 - 0.9) for path, mu in by_path(adam.mu).items()}


@pytest.fixture(scope="module")
def terms():
    """Of the whole batch at once, without the step: (values, gradients, reports).

    Values and gradients of the language loss, the sum of the layers' KLs, and the balance loss.
    """
    state, data = on_host(state_of(SOFTMAX, mesh_of())), batch()
    graph = model_graph(SOFTMAX)

    @jax.jit
    def run(params, variables, data):
        def losses(params):
            output = nnx.merge(graph, params, variables)(
                data["tokens"],
                positions=data["positions"],
                segment_ids=data["segment_ids"],
                mode=Mode(losses=True),
            )
            log_probabilities = jax.nn.log_softmax(output.logits)
            hits = jnp.take_along_axis(log_probabilities, data["targets"][..., None], -1)[..., 0]
            language = -(hits * data["loss_mask"]).sum() / data["loss_mask"].sum()
            aux = output.aux
            return (language, aux["index_kl"].sum(), aux["balance_loss"].mean()), aux

        values, pull_back, aux = jax.vjp(losses, params, has_aux=True)
        return values, [pull_back(tuple(row))[0] for row in jnp.eye(3)], aux

    values, gradients, aux = run(state.params, state.variables, data)
    return values, [by_path(gradient) for gradient in gradients], aux


def assert_gradient_is(gradient, weights, terms):
    """The sum of the terms' gradients with these weights, every one of which matters."""
    _, gradients, _ = terms
    for path, actual in gradient.items():
        parts = [np.asarray(part[path]) for part in gradients]
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6, err_msg=path)
    for part in gradients:
        assert max(np.abs(array).max() for array in part.values()) > 1e-3


def assert_reports_are(metrics, terms):
    for name, array in terms[2].items():
        np.testing.assert_allclose(metrics[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def norm(gradient):
    return math.sqrt(sum(float((array.astype(float) ** 2).sum()) for array in gradient.values()))


@pytest.mark.fast
def test_the_gradient_is_that_of_all_terms_with_their_weights(terms):
    config = changed(
        SOFTMAX, moe={"balance_weight": 0.3}, objective={"kl_weight": 0.5, "kl_reduction": "sum"}
    )
    state, (metrics,) = run_step(config, state_of(config, mesh_of()))
    gradient = gradient_in(state)
    assert_gradient_is(gradient, (1, 0.5, 0.3), terms)
    language, kl_sum, _ = terms[0]
    assert metrics["loss"] == pytest.approx(float(language), rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(float(kl_sum), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm(gradient), rel=1e-4)
    assert metrics["tokens"] == (batch()["segment_ids"] > 0).sum()
    assert_reports_are(metrics, terms)


def test_accumulated_micro_batches_on_a_mesh_are_the_big_batch(terms):
    """Four of them, of different counts, one empty; on 2 fsdp x 2 tensor x 2 expert devices."""
    config = changed(SOFTMAX, objective={"kl_weight": 1.5}, optimizer={"accumulation_steps": 4})
    mesh = mesh_of(fsdp=2, expert=2, context=2)
    state, (metrics,) = run_step(config, state_of(config, mesh), mesh=mesh)
    counts = batch()["loss_mask"].reshape(4, 4, -1).sum((0, 2))
    assert counts[3] == 0
    assert len(set(counts)) == 4
    gradient = gradient_in(state)
    assert_gradient_is(gradient, (1, 1.5 / 2, 0), terms)  # the mean over two layers
    language, kl_sum, _ = terms[0]
    assert metrics["loss"] == pytest.approx(float(language), rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(float(kl_sum) / 2, rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm(gradient), rel=1e-4)
    reports = dict(terms[2])
    reports.pop("balance_loss")  # a product of means, taken per micro-batch
    assert_reports_are(metrics, (None, None, reports))


STEPS = 30


@pytest.fixture(scope="module")
def overfit():
    """The biases before, and the state and records after training on the one batch."""
    state = state_of(CONFIG, mesh_of())
    biases = on_host(state.variables)
    return biases, *run_step(CONFIG, state, steps=STEPS)


@pytest.mark.fast
def test_training_on_one_batch_learns_it(overfit):
    _, state, records = overfit
    losses = [record["loss"] for record in records]
    assert losses[-1] < 0.3 * losses[0]
    assert records[-1]["kl_loss"] < records[0]["kl_loss"]
    assert all(record["finite"] for record in records)
    assert state.step == STEPS
    schedule = make_schedule(CONFIG.optimizer, CONFIG.train.steps)
    rates = [record["learning_rate"] for record in records]
    np.testing.assert_allclose(rates, [schedule(step) for step in range(STEPS)], rtol=1e-6)


def test_every_step_moves_the_selection_bias_by_the_rule(overfit):
    before, state, records = overfit
    loads = np.array([record["expert_load"][0] for record in records])
    rate = CONFIG.moe.bias_update_rate
    moved = rate * np.sign(loads.mean(1, keepdims=True) - loads).sum(0)
    assert len(np.unique(moved)) > 1
    (bias,), (start,) = jax.tree.leaves(state.variables), jax.tree.leaves(before)
    np.testing.assert_allclose(bias[0], start[0] + moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("poisoned", ["embedding", "index branch"])
def test_a_step_that_is_not_finite_leaves_the_state_and_says_so(poisoned, overfit):
    """With the index branch poisoned the loss is finite, and only the gradient tells."""
    state = state_of(CONFIG, mesh_of())
    params = state.params
    param = {
        "embedding": params.embedding.table,
        "index branch": params.stages[0][0].mixer.index.q,
    }[poisoned]
    param.set_value(param.get_value() * np.nan)
    before = on_host(state)
    state, (metrics,) = run_step(CONFIG, state)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (poisoned == "index branch")
    assert not np.isfinite(metrics["gradient_norm"])
    assert state.step == before.step + 1
    after = dataclasses.replace(on_host(state), step=before.step)
    for path, array in by_path(after).items():
        np.testing.assert_array_equal(array, by_path(before)[path], err_msg=path)


def test_the_warm_up_attends_densely_and_evaluation_agrees(overfit):
    """A step's loss is the evaluation's in the same phase; the two phases differ."""
    mesh, evaluate = mesh_of(), make_eval_step(CONFIG)
    targets = batch()["loss_mask"]
    losses = {}
    with jax.set_mesh(mesh):
        placed = place_batch(batch(), mesh)
        for phase in ("sparse", "warmup"):
            per_token, aux = evaluate(state_of(CONFIG, mesh), placed, Mode(phase=phase))
            assert not np.asarray(per_token)[targets == 0].any()
            assert "index_kl" not in aux
            losses[phase] = float(per_token.sum() / targets.sum())
    _, (warmup,) = run_step(CONFIG, state_of(CONFIG, mesh), phase="warmup")
    assert warmup["loss"] == pytest.approx(losses["warmup"], rel=1e-5)
    assert overfit[2][0]["loss"] == pytest.approx(losses["sparse"], rel=1e-5)
    assert abs(losses["warmup"] / losses["sparse"] - 1) > 1e-3
    assert abs(warmup["kl_loss"] / overfit[2][0]["kl_loss"] - 1) > 1e-3


BALANCED = changed(
    model={"num_layers": 8, "num_dense_layers": 2, "num_full_attention_layers": 1},
    attention={"share_every": 2},
    moe={"num_experts": 3, "bias_update_rate": 0.25},
)


def selection_biases(config, variables):
    """By layer, walking the stages: repeats outside, places in the group inside."""
    model = merge_abstract(config, variables)
    found, layer = {}, 0
    for stage, groups in zip(model.plan, model.stages, strict=True):
        for repeat in range(stage.repeats):
            for kind, block in zip(stage.kinds, groups, strict=True):
                if kind.has_experts:
                    found[layer] = np.asarray(block.feed_forward.selection_bias[...][repeat])
                layer += 1
    return found


def merge_abstract(config, variables):
    graph, params, _ = nnx.split(abstract_model(config), nnx.Param, ...)
    return nnx.merge(graph, params, variables)


def test_each_layers_bias_follows_that_layers_load():
    """Layers 0-1 are dense, 2 is alone, 3-4 and 5-6 share a stage, 7 is alone again."""
    plan = [(len(stage.kinds), stage.repeats) for stage in plan_stages(BALANCED)]
    assert plan == [(1, 1), (2, 1), (2, 2), (1, 1)]
    variables = state_of(BALANCED, mesh_of()).variables
    # Loads and directions of layers 2 to 7; equal load moves nothing.
    loads = np.array([[0, 0, 9], [0, 9, 0], [9, 0, 0], [0, 6, 6], [6, 0, 6], [5, 5, 5]])
    signs = np.array([[1, 1, -1], [1, -1, 1], [-1, 1, 1], [1, -1, -1], [-1, 1, -1], [0, 0, 0]])
    metrics = {"expert_load": jnp.asarray(loads, jnp.float32)}
    before = selection_biases(BALANCED, variables)
    after = selection_biases(BALANCED, balance_experts(BALANCED, variables, metrics))
    assert list(after) == [2, 3, 4, 5, 6, 7]
    for layer, sign in zip(after, signs, strict=True):
        np.testing.assert_allclose(after[layer], before[layer] + 0.25 * sign, rtol=1e-6)


@pytest.mark.parametrize("moe", [{"router": "softmax"}, {"bias_update_rate": 0.0}])
def test_biases_rest_where_nothing_uses_or_moves_them(moe):
    config = changed(BALANCED, moe=moe)
    variables = state_of(config, mesh_of()).variables
    metrics = {"expert_load": jnp.ones((6, 3)).at[:, 0].set(9)}
    assert balance_experts(config, variables, metrics) is variables


def test_joined_rows_are_one_document():
    """Also where a batch says otherwise; every target is then scored as with one document a row."""
    mesh, data = mesh_of(), batch()
    one = data | {"segment_ids": np.ones_like(data["segment_ids"])}
    state = state_of(CONFIG, mesh)

    def losses(config, data):
        with jax.set_mesh(mesh):
            return np.asarray(make_eval_step(config)(state, place_batch(data, mesh), Mode())[0])

    joined = changed(data={"join_documents": True})
    np.testing.assert_allclose(losses(joined, data), losses(CONFIG, one), rtol=1e-5, atol=1e-6)
    assert np.abs(losses(joined, data) - losses(CONFIG, data)).max() > 1e-3
