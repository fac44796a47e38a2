"""Models from other runs' checkpoints: as they are, or as the start of continued pretraining.

An MSA model has all the parameters of its dense twin, and its index branch besides. The two may
stack their layers differently (`msa_jax.model.plan_stages`), so parameters are matched by layer
number and not by their place in the state.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from msa_jax.config import ArchitectureConfig
from msa_jax.model import Transformer, plan_stages
from msa_jax.train.checkpoint import (
    FREE_FIELDS,
    CheckpointError,
    check_config,
    load_config,
    load_parameters,
)
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.state import TrainState, abstract_model, abstract_state

# What the parameters of a dense model do not depend on. Its checkpoint may say anything here.
INDEX_FIELDS = frozenset(
    {
        "model.num_full_attention_layers",
        "attention.kind",
        "attention.window",
        "attention.block_size",
        "attention.top_k",
        "attention.index_dim",
        "attention.index_norm",
        "attention.index_rope",
        "attention.num_local_blocks",
        "attention.num_sink_blocks",
        "attention.num_random_blocks",
        "attention.pooling",
        "attention.index_precision",
        "attention.selector",
        "attention.share_every",
        "attention.detach_index_input",
    }
)

# The submodule of a mixer that a dense model lacks.
INDEX_BRANCH = "index"

# A layer's number, None outside the layers, and the name inside it.
type Place = tuple[int | None, tuple[Any, ...]]


class _Row(NamedTuple):
    """One layer's part of a stacked array, or all of one that is not stacked."""

    array: jax.Array
    index: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape if self.index is None else self.array.shape[1:]


def load_model(
    workdir: str | os.PathLike[str], *, step: int | None = None
) -> tuple[Transformer, ExperimentConfig]:
    """The model of a checkpoint, on one device and free of any mesh, and its config.

    Args:
      workdir: of the run.
      step: which checkpoint, None for the latest.

    Raises:
      CheckpointError: there is no such checkpoint in `workdir`, or it cannot be read.
    """
    config = load_config(workdir, step=step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    graph, params, variables = nnx.split(abstract_model(config), nnx.Param, ...)
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        {"params": params, "variables": variables},
    )
    found = load_parameters(workdir, target, config, step=step)
    return nnx.merge(graph, found["params"], found["variables"]), config


def initialize_from(
    workdir: str | os.PathLike[str],
    state: TrainState,
    config: ExperimentConfig,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Replaces the parameters of a fresh state by those of another run's latest checkpoint.

    Index branches that the other run does not have stay fresh; the optimizer and the step do too.

    Args:
      workdir: of the other run, a dense (GQA) one for MSA-CPT.
      state: from `create_state(config, mesh)`.
      config: of this run.
      mesh: of this run.

    Raises:
      CheckpointError: there is no checkpoint, or it is of another architecture, or a parameter is
        missing, of another shape, or without a place in this model; the message names it.
    """
    saved = load_config(workdir)
    check_config(saved, config, source=workdir, free=FREE_FIELDS | INDEX_FIELDS)
    abstract = abstract_state(saved, mesh)
    parts = {"params": abstract.params, "variables": abstract.variables}
    found = load_parameters(workdir, parts, saved)
    with jax.set_mesh(mesh):
        params = _take(state.params, config, found["params"], saved, workdir)
        variables = _take(state.variables, config, found["variables"], saved, workdir)
    return dataclasses.replace(state, params=params, variables=variables)


def _take(
    target: nnx.State,
    config: ArchitectureConfig,
    found: nnx.State,
    saved: ArchitectureConfig,
    workdir: str | os.PathLike[str],
) -> nnx.State:
    """`target` with what `found` has for it, stacked as in the target."""
    source = {
        place: row
        for _, variable, places in _by_layer(found, saved)
        for place, row in zip(places, _rows(variable, places), strict=True)
    }
    taken, problems = [], []
    for path, variable, places in _by_layer(target, config):
        rows = []
        for place, fresh in zip(places, _rows(variable, places), strict=True):
            row = source.pop(place, fresh if INDEX_BRANCH in path else None)
            if row is None:
                problems.append(f"{_text(place)}: not in the checkpoint")
            elif row.shape != fresh.shape:
                problems.append(f"{_text(place)}: checkpoint {row.shape}, model {fresh.shape}")
            else:
                rows.append(row)
        taken.append((path, variable, rows))
    problems += [f"{_text(place)}: in the checkpoint only" for place in source]
    if problems:
        shown = problems[:8] + [f"and {len(problems) - 8} more"] * (len(problems) > 8)
        raise CheckpointError(f"the parameters in {workdir} do not fit: {'; '.join(shown)}")
    return nnx.from_flat_state([(path, v.replace(_stack(rows))) for path, v, rows in taken])


def _by_layer(
    variables: nnx.State, config: ArchitectureConfig
) -> Iterator[tuple[Any, nnx.Variable, list[Place]]]:
    """Each variable with its path and the places of its rows."""
    stages = plan_stages(config)
    first = [sum(s.repeats * len(s.kinds) for s in stages[:i]) for i in range(len(stages))]
    for path, variable in nnx.to_flat_state(variables):
        if path[0] != "stages":
            yield path, variable, [(None, path)]
            continue
        stage, place, name = int(str(path[1])), int(str(path[2])), path[3:]
        period = len(stages[stage].kinds)
        layers = [first[stage] + r * period + place for r in range(stages[stage].repeats)]
        yield path, variable, [(layer, name) for layer in layers]


def _rows(variable: nnx.Variable, places: list[Place]) -> list[_Row]:
    array = variable.get_value()
    stacked = places[0][0] is not None
    return [_Row(array, index if stacked else None) for index in range(len(places))]


def _stack(rows: list[_Row]) -> jax.Array:
    """The rows as one array; no copy where they are one array's, all and in order."""
    whole = rows[0].array
    indices = [row.index for row in rows if row.array is whole]
    if len(indices) == len(rows) and indices in ([None], list(range(len(whole)))):
        return whole
    return jnp.stack([row.array[row.index] for row in rows])


def _text(place: Place) -> str:
    layer, name = place
    text = "/".join(str(part) for part in name)
    return text if layer is None else f"layer {layer} {text}"
