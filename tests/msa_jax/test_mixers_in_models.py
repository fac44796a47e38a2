"""Latent and recurrent mixers in whole models: a training step on meshes, and generation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig
from msa_jax.decoding import generate
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.model import Transformer
from msa_jax.sharding import MESH_AXES, make_mesh, place_batch
from msa_jax.train.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from msa_jax.train.state import TrainState, abstract_state
from msa_jax.train.step import make_train_step

KINDS = ("mla", "linear", "mamba2")
ROWS, LENGTH, VOCAB = 8, 16, 12
CONFIG = ExperimentConfig(
    ModelConfig(
        vocab_size=VOCAB,
        d_model=8,
        num_layers=1,
        ffn_dim=6,
        compute_dtype="float32",
        scan_layers=False,
    ),
    AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        rope_dim=2,
        block_size=4,
        top_k=2,
        mla=MLAConfig(latent_dim=6, query_latent_dim=5, rope_head_dim=2, value_dim=3),
        linear=LinearConfig(value_dim=3, chunk_size=4),
        mamba2=Mamba2Config(state_dim=3, head_dim=4, chunk_size=5),
    ),
    MoEConfig(num_experts=0),
    data=DataConfig(sequence_length=LENGTH, batch_size=ROWS),
    optimizer=OptimizerConfig(gradient_clip=0.0),
    train=TrainConfig(steps=10),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def config_of(kind):
    return dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, kind=kind))


def mesh_of(**changes):
    sizes = dict.fromkeys(MESH_AXES, 1) | changes
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


def batch():
    """Two documents a row, the second of a length of its own, padding behind it."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segment_ids = np.repeat([[1, 2]], 8, axis=1).repeat(ROWS, axis=0).astype(np.int32)
    for row in range(ROWS):
        segment_ids[row, LENGTH - row :] = 0
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segment_ids,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32) % 8, (ROWS, 1)),
        "loss_mask": (segment_ids > 0).astype(np.int32),
    }


def step_on(mesh, config):
    """Metrics and gradients of one step from arbitrary parameters.

    After the first step Adam's first moment is a tenth of the gradient.
    """
    rng = np.random.default_rng(0)

    def put(tree, scale):
        def draw(leaf):
            values = scale * rng.normal(size=leaf.shape)
            return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

        return jax.tree.map(draw, tree)

    scales = {"step": 0, "params": 0.3, "variables": 0, "opt_state": 0}
    abstract = abstract_state(config, mesh)
    state = TrainState(**{n: put(getattr(abstract, n), scale) for n, scale in scales.items()})
    with jax.set_mesh(mesh):
        state, metrics = make_train_step(config)(state, place_batch(batch(), mesh), "sparse")
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    paths = jax.tree_util.tree_leaves_with_path(adam.mu)
    gradients = {jax.tree_util.keystr(path): 10 * np.asarray(leaf) for path, leaf in paths}
    return jax.device_get(metrics), gradients


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        ("mla", {"fsdp": 2, "tensor": 2, "context": 2}),
        ("linear", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("mamba2", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_a_step_on_a_mesh_is_that_of_one_device(kind, axes):
    """Rows, parameters and heads are split, and the tokens of a row where no state crosses them."""
    config = config_of(kind)
    metrics, gradients = step_on(mesh_of(), config)
    split_metrics, split_gradients = step_on(mesh_of(**axes), config)
    assert metrics["finite"]
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-5)
    assert gradients.keys() == split_gradients.keys()
    for path, gradient in gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-6, path
        np.testing.assert_allclose(
            split_gradients[path], gradient, rtol=1e-3, atol=1e-4 * scale, err_msg=path
        )


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_go_on_as_each_alone(kind, filled):
    """Whatever their padding."""
    model = filled(lambda rngs: Transformer(config_of(kind), rngs=rngs), scale=0.6)
    lengths, width, new = (9, 4, 1), 9, 6
    prompts = np.random.default_rng(0).integers(0, VOCAB, (3, width)).astype(np.int32)
    padded = np.where(np.arange(width) < np.array(lengths)[:, None], prompts, VOCAB - 1)
    together = generate(
        model,
        jnp.asarray(padded),
        prompt_lengths=jnp.array(lengths, jnp.int32),
        max_new_tokens=new,
    )
    forward = jax.jit(lambda model, tokens: model(tokens).logits)
    for row, length in enumerate(lengths):
        tokens = np.zeros((1, width + new), np.int32)
        tokens[0, :length] = prompts[row, :length]
        for place in range(length, length + new):
            tokens[0, place] = np.asarray(forward(model, tokens))[0, place - 1].argmax()
        assert together[row].tolist() == tokens[0, length : length + new].tolist()
    assert len(np.unique(np.asarray(together))) > 2
