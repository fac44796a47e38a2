"""A config's whole training step, lowered for devices that are not there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.compiling.targets import Place
from msa_jax.cost import Phase
from msa_jax.data.packing import BATCH_KEYS
from msa_jax.sharding import RULES, make_mesh
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.state import abstract_state
from msa_jax.train.step import make_train_step


def lower_step(config: ExperimentConfig, place: Place, phase: Phase) -> jax.stages.Lowered:
    """The step on a mesh of all the place's devices; allocates nothing.

    Args:
      config: its mesh axes must divide the devices.
      place: to compile for.
      phase: "sparse" or "warmup".

    Raises:
      ConfigError: the mesh does not fit the devices, or splits a parameter unevenly.
    """
    mesh = make_mesh(dataclasses.asdict(config.mesh), place.devices())
    rows = jax.NamedSharding(mesh, RULES.spec("batch", "sequence", mesh_axes=mesh.axis_names))
    shape = config.data.batch_size, config.data.sequence_length
    row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    with jax.set_mesh(mesh), place.traced():
        state = abstract_state(config, mesh)
        step: Any = make_train_step(config)
        return step.lower(state, dict.fromkeys(BATCH_KEYS, row), phase)
