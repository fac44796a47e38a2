"""A training step of a whole model with each of the softmax-attention baselines as its mixer."""

import dataclasses

import jax
import numpy as np
import pytest

from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig, dense_twin
from msa_jax.model import plan_stages
from msa_jax.sharding import make_mesh, place_batch
from msa_jax.train.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from msa_jax.train.loop import phase_of
from msa_jax.train.state import TrainState, abstract_state
from msa_jax.train.step import make_train_step

ROWS, LENGTH, VOCAB = 2, 24, 12
CONFIG = ExperimentConfig(
    ModelConfig(
        vocab_size=VOCAB,
        d_model=8,
        num_layers=2,
        ffn_dim=8,
        compute_dtype="float32",
    ),
    AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_dim=4,
        rope_theta=100.0,
        block_size=4,
        top_k=3,
        index_dim=4,
    ),
    MoEConfig(num_experts=0),
    data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
    # Without clipping, Adam's first moment is (1 - b1) times the gradient.
    optimizer=OptimizerConfig(warmup_steps=0, gradient_clip=0.0),
    train=TrainConfig(steps=10),
)
KINDS = {
    "mha": {},
    "sliding_window": {"window": 5},
    "longformer": {"num_sink_blocks": 1},
    "bigbird": {"num_sink_blocks": 1, "num_random_blocks": 1},
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(params=KINDS)
def config(request):
    attention = dataclasses.replace(CONFIG.attention, kind=request.param, **KINDS[request.param])
    return dataclasses.replace(CONFIG, attention=attention)


def random_state(config, mesh):
    rng = np.random.default_rng(0)

    def put(tree, scale):
        return jax.tree.map(
            lambda leaf: jax.device_put(
                (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding
            ),
            tree,
        )

    a = abstract_state(config, mesh)
    return TrainState(
        put(a.step, 0), put(a.params, 0.3), put(a.variables, 0.1), put(a.opt_state, 0)
    )


def packed_batch():
    """Two documents and padding in each row."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segment_ids = np.where(np.arange(LENGTH) < 16, 1, 2) * np.ones((ROWS, 1), np.int32)
    segment_ids[:, 22:] = 0
    position = np.arange(LENGTH) * np.ones((ROWS, 1), np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": np.where(segment_ids == 2, position - 16, position).astype(np.int32),
        "loss_mask": (segment_ids > 0).astype(np.int32),
    }


def test_a_step_moves_every_parameter_by_a_finite_gradient(config):
    """On two devices, which split the heads; there is no index branch and no KL."""
    mesh = make_mesh({"data": 1, "tensor": 2}, jax.devices()[:2])
    state = random_state(config, mesh)
    before = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
    with jax.set_mesh(mesh):
        placed = place_batch(packed_batch(), mesh)
        state, metrics = make_train_step(config)(state, placed, phase_of(config, 1))
    assert metrics["finite"]
    assert "index_kl" not in metrics
    assert metrics["kl_loss"] == 0
    assert 1 < metrics["loss"] < 10
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    for path, moment in jax.tree_util.tree_leaves_with_path(adam.mu):
        assert np.isfinite(moment).all()
        # Every layer of a stack, whatever its mixer.
        per_layer = np.abs(moment).reshape(*moment.shape[: moment.ndim > 2], -1).max(-1)
        assert (per_layer > 1e-7).all(), jax.tree_util.keystr(path)
    for old, new in zip(before, jax.tree.leaves(state.params), strict=True):
        assert (old != np.asarray(new)).any()


def test_leading_layers_attend_to_everything_and_there_is_no_warm_up(config):
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=3, num_full_attention_layers=1),
        objective=dataclasses.replace(config.objective, index_warmup_steps=5),
    )
    kinds = [kind.attention.kind for stage in plan_stages(config) for kind in stage.kinds]
    own = config.attention.kind
    assert kinds == (["mha"] if own == "mha" else ["gqa", own])
    assert [stage.repeats for stage in plan_stages(config)] == ([3] if own == "mha" else [1, 2])
    selects = own in ("longformer", "bigbird")
    assert [config.computes_selection(layer) for layer in range(3)] == [False, selects, selects]
    assert phase_of(config, 1) == "sparse"
    twin = dense_twin(config)
    assert {twin.attention_of(layer) for layer in range(3)} == {twin.attention}


def test_heads_of_multi_head_attention_split_where_kv_heads_would_not():
    attention = dataclasses.replace(CONFIG.attention, kind="mha", num_kv_heads=1)
    config = dataclasses.replace(CONFIG, attention=attention)
    mesh = make_mesh({"data": 1, "tensor": 4}, jax.devices()[:4])
    shapes = {
        jax.tree_util.keystr(path): leaf.sharding.shard_shape(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state(config, mesh).params)
    }
    (keys,) = [shape for path, shape in shapes.items() if "'main'" in path and "'k'" in path]
    assert keys == (2, 8, 1, 8)
