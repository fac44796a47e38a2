"""MSA-CPT: a state takes a dense run's parameters layer by layer, however layers are stacked."""

import dataclasses

import jax
import numpy as np
import pytest

from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig, dense_twin
from msa_jax.model import plan_stages
from msa_jax.sharding import make_mesh
from msa_jax.train import initialize
from msa_jax.train.checkpoint import Checkpointer, CheckpointError, named_arrays
from msa_jax.train.config import DataConfig, ExperimentConfig
from msa_jax.train.initialize import initialize_from
from msa_jax.train.state import TrainState, abstract_state

# Two leading layers with dense feed-forward, one with full attention, selections shared by two.
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=16,
        d_model=8,
        num_layers=7,
        num_dense_layers=2,
        num_full_attention_layers=1,
        ffn_dim=8,
    ),
    attention=AttentionConfig(
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        rope_dim=2,
        block_size=8,
        top_k=2,
        index_dim=4,
        share_every=2,
    ),
    moe=MoEConfig(num_experts=2, top_k=1, expert_dim=8),
    data=DataConfig(sequence_length=32),
)
DENSE = dense_twin(CONFIG)


def mesh_of(**sizes) -> jax.sharding.Mesh:
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, **sizes}
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def random_state(config: ExperimentConfig, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
    rng = np.random.default_rng(seed)

    def fill(abstract):
        return jax.device_put(
            rng.normal(size=abstract.shape).astype(abstract.dtype), abstract.sharding
        )

    return jax.tree.map(fill, abstract_state(config, mesh))


def by_layer(state: TrainState, config: ExperimentConfig) -> dict[str, np.ndarray]:
    """Arrays without their stacks, by layer; counts layers as `plan_stages` lists them."""
    layers, number = {}, 0
    for index, stage in enumerate(plan_stages(config)):
        for repeat in range(stage.repeats):
            for place in range(len(stage.kinds)):
                layers[index, place, repeat] = number
                number += 1
    arrays = {}
    for name, array in named_arrays(state).items():
        part, *path = name.split("/")
        if part not in ("params", "variables"):
            continue
        if path[0] != "stages":
            arrays[name] = np.asarray(array)
            continue
        for repeat in range(array.shape[0]):
            layer = layers[int(path[1]), int(path[2]), repeat]
            arrays["/".join([part, str(layer), *path[3:]])] = np.asarray(array)[repeat]
    return arrays


def save(workdir, state, config):
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(9, state, {}, config)


def test_every_layer_gets_its_own_dense_parameters(tmp_path):
    config = CONFIG
    assert [(len(s.kinds), s.repeats) for s in plan_stages(DENSE)] == [(1, 2), (1, 5)]
    assert [(len(s.kinds), s.repeats) for s in plan_stages(config)] == [(1, 1), (2, 1), (2, 2)]
    mesh = mesh_of(fsdp=2, tensor=2)
    dense, fresh = random_state(DENSE, mesh_of(), 0), random_state(config, mesh, 1)
    save(tmp_path, dense, DENSE)
    state = initialize_from(tmp_path, fresh, config, mesh)

    taken, given, before = (
        by_layer(s, c) for s, c in ((state, config), (dense, DENSE), (fresh, config))
    )
    index = {name for name in taken if "/index/" in name}
    assert {name.split("/")[1] for name in index} == {"1", "3", "5"}
    assert taken.keys() - index == given.keys()
    for name, array in taken.items():
        np.testing.assert_array_equal(array, (before if name in index else given)[name], name)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert got.sharding == want.sharding
        assert got.dtype == want.dtype
    assert state.step == fresh.step
    for got, want in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(fresh.opt_state), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_trained_index_branch_is_taken_too(tmp_path):
    config = dataclasses.replace(CONFIG, data=DataConfig(sequence_length=64))
    given, fresh = (random_state(CONFIG, mesh_of(), seed) for seed in (0, 1))
    save(tmp_path, given, CONFIG)
    state = initialize_from(tmp_path, fresh, config, mesh_of())
    for name, array in by_layer(state, config).items():
        np.testing.assert_array_equal(array, by_layer(given, CONFIG)[name], name)


def test_layers_without_an_index_branch_in_the_checkpoint_keep_theirs(tmp_path):
    """Layers 3 and 5 are one stack; only 5 is in the checkpoint."""
    saved = replace_section(CONFIG, "model", num_full_attention_layers=5)
    given, fresh = random_state(saved, mesh_of(), 0), random_state(CONFIG, mesh_of(), 1)
    save(tmp_path, given, saved)
    taken = by_layer(initialize_from(tmp_path, fresh, CONFIG, mesh_of()), CONFIG)
    for layer, source, config in ((1, fresh, CONFIG), (3, fresh, CONFIG), (5, given, saved)):
        name = f"params/{layer}/mixer/index/q"
        np.testing.assert_array_equal(taken[name], by_layer(source, config)[name], name)


def replace_section(config: ExperimentConfig, section: str, **fields) -> ExperimentConfig:
    changed = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: changed})


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            replace_section(DENSE, "attention", rope_theta=1e4),
            r"\(attention\.rope_theta: checkpoint 10000\.0, config 5000000\.0\)",
        ),
        (
            replace_section(DENSE, "model", num_layers=3),
            r"model\.num_layers: checkpoint 3, config 7",
        ),
        (
            replace_section(CONFIG, "attention", index_dim=6),
            r"layer 1 mixer/index/q: checkpoint \(8, 2, 6\), model \(8, 2, 4\)",
        ),
        # An index branch in layers that will have none.
        (
            replace_section(CONFIG, "attention", share_every=1),
            r"do not fit: layer 2 mixer/index/k: in the checkpoint only; .*and 4 more",
        ),
        # What only an index branch may be: missing.
        (
            replace_section(DENSE, "attention", qk_norm=False),
            r"do not fit: layer 0 mixer/main/k_norm/weight: not in the checkpoint; .*and 6 more",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, monkeypatch, saved, message):
    if not saved.attention.qk_norm:  # as if the field were free, to get past it
        free = initialize.FREE_FIELDS | {"attention.qk_norm"}
        monkeypatch.setattr(initialize, "FREE_FIELDS", free)
    save(tmp_path, random_state(saved, mesh_of(), 0), saved)
    fresh = random_state(CONFIG, mesh_of(), 1)
    with pytest.raises(CheckpointError, match=message):
        initialize_from(tmp_path, fresh, CONFIG, mesh_of())


def test_a_main_parameter_that_is_missing_is_named(tmp_path):
    """A checkpoint whose config promises more than its arrays hold."""
    state = random_state(DENSE, mesh_of(), 0)
    del state.params["stages"][0][0]["mixer"]["main"]["q"]
    save(tmp_path, state, DENSE)
    fresh = random_state(CONFIG, mesh_of(), 1)
    with pytest.raises(CheckpointError, match="params/stages/0/0/mixer/main/q: not in the check"):
        initialize_from(tmp_path, fresh, CONFIG, mesh_of())
