"""A fresh training state: really sharded, the same on every mesh, and known before it is made."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from msa_jax.model import Transformer
from msa_jax.sharding import MESH_AXES, make_mesh
from msa_jax.train.config import DataConfig, ExperimentConfig, TrainConfig
from msa_jax.train.state import abstract_state, create_state, merge_model, model_graph

CONFIG = ExperimentConfig(
    ModelConfig(vocab_size=16, d_model=8, num_layers=1, compute_dtype="float32"),
    AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, rope_dim=4, block_size=4, top_k=2, index_dim=4
    ),
    MoEConfig(num_experts=4, top_k=2, expert_dim=6),
    data=DataConfig(sequence_length=16, batch_size=8),
    train=TrainConfig(seed=3),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def mesh_of(**changes):
    sizes = dict.fromkeys(MESH_AXES, 1) | changes
    return make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(fsdp=2, tensor=2, expert=2)


@pytest.fixture(scope="module")
def state(mesh):
    return create_state(CONFIG, mesh)


def by_path(tree):
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_parameters_and_moments_are_split_alike(state):
    """By what each device holds: a half along every axis that a mesh axis splits."""
    (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
    for tree in (state.params, adam.mu, adam.nu):
        block = tree.stages[0][0]
        held = {
            name: param.get_value().addressable_shards[0].data.shape
            for name, param in {
                "table": tree.embedding.table,
                "q": block.mixer.main.q,
                "index_q": block.mixer.index.q,
                "experts": block.feed_forward.down,
                "shared": block.feed_forward.shared.down,
                "gain": tree.final_norm.weight,
            }.items()
        }
        assert held == {
            "table": (16 // 2, 8 // 2),
            "q": (1, 8 // 2, 4 // 2, 8),
            "index_q": (1, 8 // 2, 2 // 2, 4),
            "experts": (1, 4 // 2, 6 // 2, 8 // 2),
            "shared": (1, 6 // 2, 8 // 2),
            "gain": (8,),
        }
    assert state.step == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adam.mu))


def test_the_abstract_state_is_the_states_shapes_dtypes_and_shardings(state, mesh):
    actual, abstract = by_path(state), by_path(abstract_state(CONFIG, mesh))
    assert actual.keys() == abstract.keys()
    for path, array in actual.items():
        promised = abstract[path]
        assert isinstance(promised, jax.ShapeDtypeStruct)
        assert (promised.shape, promised.dtype) == (array.shape, array.dtype), path
        assert array.sharding.is_equivalent_to(promised.sharding, array.ndim), path


@pytest.mark.fast
def test_a_seed_gives_the_same_parameters_on_every_mesh(state):
    """Those of the model made by hand."""
    make = jax.jit(lambda key: Transformer(CONFIG, rngs=nnx.Rngs(key)))
    model = make(jax.random.key(CONFIG.train.seed))
    expected = by_path(nnx.state(model, nnx.Param))
    actual = by_path(state.params)
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-5, err_msg=path)


def test_a_state_merges_into_the_model(state):
    model = merge_model(model_graph(CONFIG), state)
    assert isinstance(model, Transformer)
    assert model.embedding.table.get_value() is state.params.embedding.table.get_value()
    assert model.stages[0][0].feed_forward.selection_bias.shape == (1, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}


def test_a_mesh_that_does_not_divide_is_an_error_before_anything_is_made():
    for make in (create_state, abstract_state):
        with pytest.raises(
            ConfigError, match=r"mesh.tensor=4: does not divide the \w+ axis of stag"
        ):
            make(CONFIG, mesh_of(tensor=4))
