"""The training state, and how it is made on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msa_jax.model import Transformer
from msa_jax.sharding import parameter_shardings
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a training step changes.

    Attributes:
      step: finished optimizer steps, an int32 scalar. (Not typed as an array: trees of shapes or
        shardings have this class too.)
      params: what gradients update (`nnx.Param`).
      variables: the rest of the model's variables: selection biases.
      opt_state: the optimizer's.
    """

    step: Any
    params: nnx.State
    variables: nnx.State
    opt_state: optax.OptState


def abstract_model(config: ExperimentConfig) -> Transformer:
    """The model with shapes for arrays; allocates nothing."""
    return jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def model_graph(config: ExperimentConfig) -> nnx.GraphDef:
    """The model without its arrays, for `merge_model`."""
    graph, _, _ = nnx.split(abstract_model(config), nnx.Param, ...)
    return graph


def merge_model(graph: nnx.GraphDef, state: TrainState) -> Transformer:
    """The model with the state's parameters."""
    return nnx.merge(graph, state.params, state.variables)


def create_state(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, every array made where it lives.

    Raises:
      ConfigError: a mesh axis does not divide a parameter axis.
    """
    with jax.set_mesh(mesh):
        return jax.jit(_state_maker(config, mesh))(jax.random.key(config.train.seed))


def abstract_state(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """The state's shapes and shardings; allocates nothing."""
    with jax.set_mesh(mesh):
        make = _state_maker(config, mesh)
        # Not even the key: the mesh's devices may be ones to compile for, that are not there.
        key = jax.eval_shape(jax.random.key, config.train.seed)
        state = jax.eval_shape(make, key)

    def place(array):
        # A type inside a mesh context carries a spec, or nothing if whole; restoring needs devices.
        spec = jax.P() if array.sharding is None else array.sharding.spec
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, state)


def _state_maker(config: ExperimentConfig, mesh: jax.sharding.Mesh):
    _, params, variables = nnx.split(abstract_model(config), nnx.Param, ...)
    shardings = parameter_shardings(params, mesh), parameter_shardings(variables, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)

    def make(key):
        model = Transformer(config, rngs=nnx.Rngs(key))
        _, params, variables = nnx.split(model, nnx.Param, ...)
        params, variables = jax.tree.map(jax.reshard, (params, variables), shardings)
        return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params))

    return make
