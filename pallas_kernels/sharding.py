"""Runs an op on each device's own batch rows, heads and queries.

XLA cannot partition a kernel call, so every op owns its `shard_map`. All ops here are independent
over batch rows, over KV heads with their query-head groups, and over queries: a device that holds
some of each needs nothing from the others but all keys of its rows and heads. So key axes stay
whole, and a device is told in which slot its first query sits.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def shard_over_batch_heads_and_queries[R](
    fn: Callable[..., R], layouts: Sequence[str], out_layouts: Sequence[str]
) -> Callable[..., R]:
    """Wraps `fn` in a `shard_map` over the explicit mesh axes that its first argument is split on.

    Without an explicit mesh, or inside another `shard_map`, `fn` is called as it is. An axis that
    is meant whole but arrives split is gathered; its gradient is the sum over those devices.

    Args:
      fn: function of arrays; an argument that is no array (None, an int) is passed as it is.
      layouts: per argument, a letter per axis: "b" batch, "h" heads (KV heads or whole groups of
        query heads), "q" queries, "." whole. The first argument must have "b", "h" and "q". The
        layout "o" is that of the slot of the first query, an int or an array [B]: where queries are
        split over several devices, `fn` gets the array [B] for the queries of its own, and else
        what was given.
      out_layouts: the same for the results; `fn` returns a tuple of that length.

    Raises:
      ValueError: from the call, if the mesh axes do not divide an argument's batch or heads. They
        divide the first argument, queries among them: jax places no array that they do not.
    """

    def run(*args):
        mesh = jax.sharding.get_abstract_mesh()
        explicit = [t == AxisType.Explicit for t in mesh.axis_types]
        if mesh.empty or not all(explicit):
            return fn(*args)
        first = jax.typeof(args[0]).sharding.spec
        axes = {letter: first[i] for i, letter in enumerate(layouts[0]) if letter != "."}
        axes |= {".": None, "o": axes["b"]}
        present = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array)]

        def local(*arrays):
            complete = list(args)
            for i, array in zip(present, arrays, strict=True):
                complete[i] = array
            if _num_devices(mesh, axes["q"]) > 1:
                _move_offset(complete, layouts, axes["q"])
            return fn(*complete)

        in_specs = tuple(_spec(layouts[i], axes) for i in present)
        for i, spec in zip(present, in_specs, strict=True):
            _check(args[i], spec, layouts[i], mesh)
        arrays = [jax.reshard(args[i], spec) for i, spec in zip(present, in_specs, strict=True)]
        out_specs = tuple(_spec(layout, axes) for layout in out_layouts)
        # Kernels know nothing of the types that tell which mesh axes a value varies over.
        sharded = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return sharded(*arrays)

    return run


def _move_offset(args: list, layouts: Sequence[str], query_axes: str | tuple[str, ...]) -> None:
    """Replaces the first query's slot by that of this device's first query, per row."""
    batch, num_queries = (args[0].shape[layouts[0].index(letter)] for letter in "bq")
    before = jax.lax.axis_index(query_axes) * num_queries
    where = layouts.index("o")
    args[where] = jnp.broadcast_to(args[where] + before, (batch,))


def _spec(layout: str, axes: dict[str, object]) -> PartitionSpec:
    return PartitionSpec(*(axes[letter] for letter in layout))


def _check(array: jax.Array, spec: PartitionSpec, layout: str, mesh) -> None:
    """Refuses an axis that the mesh axes meant for it do not divide."""
    for size, names, letter in zip(array.shape, spec, layout, strict=True):
        parts = _num_devices(mesh, names)
        if size % parts:
            what = {"b": "batch", "o": "batch", "h": "KV heads"}[letter]
            raise ValueError(
                f"{what}={size} is not divisible by the {parts} devices of mesh axes "
                f"{_names(names)}; choose a smaller mesh axis"
            )


def _num_devices(mesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along the mesh axes of one entry of a PartitionSpec."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()
