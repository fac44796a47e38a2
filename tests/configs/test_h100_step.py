"""The H100 configuration's whole training step, traced at full size; nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from configs.h100_350m import get_config
from msa_jax.data.packing import BATCH_KEYS
from msa_jax.sharding import make_mesh
from msa_jax.train.config import ExperimentConfig, from_config_dict
from msa_jax.train.state import abstract_state
from msa_jax.train.step import make_train_step


@pytest.mark.parametrize(("variant", "phase"), [("", "sparse"), ("", "warmup"), ("gqa", "sparse")])
def test_the_step_traces_and_fits(variant, phase):
    config = from_config_dict(ExperimentConfig, get_config(variant))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}, jax.devices()[:1])
    shape = (config.data.batch_size, config.data.sequence_length)
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        state = abstract_state(config, mesh)
        step = make_train_step(config)
        traced = step.trace(state, dict.fromkeys(BATCH_KEYS, row), phase)
    new, metrics = traced.out_info
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()
    layers = config.model.num_layers if variant == "" else 0
    assert ("index_kl" in metrics) == bool(layers)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert 12 * 340e6 < size < 12 * 360e6  # parameters and two moments
