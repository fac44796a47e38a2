"""Where arrays live: logical axis names, and the one place that maps them to mesh axes.

Parameters name their axes when they are made (`logical_axes` metadata); activations name theirs at
the few points where the compiler could not know. Without an explicit mesh every function here
returns its input, so modules work as they are in a stranger's program.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from msa_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")

type MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis.

    Attributes:
      batch: rows of activations.
      sequence: tokens of a row of activations; attention gathers the keys.
      embed: the d_model axis of parameters; gathered before use (ZeRO-3 style).
      heads: query heads, KV heads and index heads.
      mlp: feed-forward width.
      vocab: embedding rows and logits.
      experts: routed experts.
    """

    batch: MeshAxes = ("data", "fsdp", "expert")
    sequence: MeshAxes = "context"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    experts: MeshAxes = "expert"

    def spec(self, *logical_axes: str | None, mesh_axes: tuple[str, ...]) -> PartitionSpec:
        """The PartitionSpec of logical axes on a mesh; None, and axes it lacks, are unsplit."""
        return PartitionSpec(*(self._resolve(axis, mesh_axes) for axis in logical_axes))

    def _resolve(self, axis: str | None, mesh_axes: tuple[str, ...]) -> MeshAxes:
        names = () if axis is None else axis_names(getattr(self, axis))
        kept = tuple(name for name in names if name in mesh_axes)
        return kept[0] if len(kept) == 1 else kept or None


RULES = ShardingRules()


def axis_names(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec, however it is written."""
    return (axes,) if isinstance(axes, str) else axes or ()


def explicit_axes() -> tuple[str, ...]:
    """Names of the current mesh's explicit axes; none outside a mesh or inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(t != AxisType.Explicit for t in mesh.axis_types):
        return ()
    return mesh.axis_names


def out_spec(*logical_axes: str | None) -> PartitionSpec | None:
    """The `out_sharding` of an operation whose result has these axes; None without a mesh."""
    axes = explicit_axes()
    return RULES.spec(*logical_axes, mesh_axes=axes) if axes else None


def constrain(x: Array, *logical_axes: str | None) -> Array:
    """`x` laid out by its logical axes; unchanged without an explicit mesh."""
    spec = out_spec(*logical_axes)
    return x if spec is None else jax.reshard(x, spec)


def weight(param: nnx.Param, dtype: str | jnp.dtype | None = None) -> Array:
    """A parameter ready for a matmul: cast, then gathered along its fsdp-split axis."""
    value = param[...] if dtype is None else param[...].astype(dtype)
    axes = param.get_metadata()["logical_axes"]
    return constrain(value, *(None if axis == "embed" else axis for axis in axes))


def project(
    equation: str, x: Array, param: nnx.Param, dtype: str | jnp.dtype, *out_axes: str | None
) -> Array:
    """einsum of activations with a parameter in `dtype`, the result laid out as `out_axes`."""
    return jnp.einsum(
        equation, x.astype(dtype), weight(param, dtype), out_sharding=out_spec(*out_axes)
    )


def make_mesh(
    sizes: Mapping[str, int], devices: list[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """An explicit mesh over all devices.

    Args:
      sizes: devices per axis of `MESH_AXES`; one may be -1 for all that remain, and those left
        out have one.
      devices: all of them by default.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in sizes.values() if size != -1)
    rest, remainder = divmod(len(devices), known)
    resolved = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    resolved = {axis: rest if size == -1 else size for axis, size in resolved.items()}
    if remainder or math.prod(resolved.values()) != len(devices):
        raise ConfigError(
            f"mesh={dict(sizes)}: does not divide the {len(devices)} devices there are; set one "
            "axis to -1, or make the product match"
        )
    array = np.asarray(devices).reshape(tuple(resolved.values()))
    return jax.sharding.Mesh(array, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def parameter_shardings(variables: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """A NamedSharding for every variable, from its `logical_axes`.

    Stacked layers have leading axes beyond the named ones; those stay unsplit. A variable without
    names is replicated.

    Raises:
      ConfigError: a mesh axis that does not divide the parameter axis it should split.
    """

    def place(path, variable):
        axes = variable.get_metadata().get("logical_axes", ())
        shape = variable.get_value().shape
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes)
        spec = RULES.spec(*axes, mesh_axes=mesh.axis_names)
        for size, axis, names in zip(shape, axes, spec, strict=True):
            parts = math.prod(mesh.shape[name] for name in axis_names(names))
            if size % parts:
                where = "/".join(str(part) for part in path)
                raise ConfigError(
                    f"mesh.{names}={parts}: does not divide the {axis} axis of {where}, which has "
                    f"{size} entries; choose a divisor"
                )
        return variable.replace(NamedSharding(mesh, spec))

    flat = nnx.to_flat_state(variables)
    return nnx.from_flat_state([(path, place(path, variable)) for path, variable in flat])


def place_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """Host arrays [B, T] of this process as global arrays, split over batch and sequence axes.

    Raises:
      ConfigError: the mesh axes that split the batch do not divide its rows, or those that split
        the sequence do not divide its length or the devices of a process.
    """
    spec = RULES.spec("batch", "sequence", mesh_axes=mesh.axis_names)
    parts, pieces = (math.prod(mesh.shape[name] for name in axis_names(axes)) for axes in spec)
    rows, length = next(iter(batch.values())).shape
    rows *= jax.process_count()
    if length % pieces or jax.local_device_count() % pieces:
        raise ConfigError(
            f"mesh.{spec[1]}={pieces}: does not divide the {length} tokens of a row or the "
            f"{jax.local_device_count()} devices of a process; choose a divisor of both"
        )
    if rows % parts:
        raise ConfigError(
            f"data.batch_size={rows}: is not divisible by the {parts} devices of mesh axes "
            f"{', '.join(axis_names(spec[0]))} that split it; choose a multiple of {parts}"
        )
    sharding = NamedSharding(mesh, spec)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
