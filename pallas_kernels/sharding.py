"""Runs an op on each device's own batch rows and heads.

XLA cannot partition a kernel call, so every op owns its `shard_map`. All ops here are independent
over batch rows and over KV heads with their query-head groups: a device that holds some rows and
some groups needs nothing from the others. The sequence axes stay whole.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec


def shard_over_batch_and_heads[R](
    fn: Callable[..., R], layouts: Sequence[str], out_layouts: Sequence[str]
) -> Callable[..., R]:
    """Wraps `fn` in a `shard_map` over the explicit mesh axes that its first argument is split on.

    Without an explicit mesh, or inside another `shard_map`, `fn` is called as it is. An axis that
    is meant whole but arrives split is gathered.

    Args:
      fn: function of arrays; an argument that is no array (None, an int) is passed as it is.
      layouts: per argument, a letter per axis: "b" batch, "h" heads (KV heads or whole groups of
        query heads), "." whole. The first argument must have both "b" and "h".
      out_layouts: the same for the results; `fn` returns a tuple of that length.

    Raises:
      ValueError: from the call, if the mesh axes do not divide an argument's batch or heads.
    """

    def run(*args):
        mesh = jax.sharding.get_abstract_mesh()
        explicit = [t == AxisType.Explicit for t in mesh.axis_types]
        if mesh.empty or not all(explicit):
            return fn(*args)
        first = jax.typeof(args[0]).sharding.spec
        axes = {letter: first[i] for i, letter in enumerate(layouts[0]) if letter != "."} | {
            ".": None
        }
        present = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array)]

        def local(*arrays):
            complete = list(args)
            for i, array in zip(present, arrays, strict=True):
                complete[i] = array
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


def _spec(layout: str, axes: dict[str, object]) -> PartitionSpec:
    return PartitionSpec(*(axes[letter] for letter in layout))


def _check(array: jax.Array, spec: PartitionSpec, layout: str, mesh) -> None:
    """Refuses an axis that the mesh axes meant for it do not divide."""
    for size, names, letter in zip(array.shape, spec, layout, strict=True):
        names = (names,) if isinstance(names, str) else names or ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        if size % parts:
            what = {"b": "batch", "h": "KV heads"}[letter]
            raise ValueError(
                f"{what}={size} is not divisible by the {parts} devices of mesh axes {names}; "
                f"choose a smaller mesh axis"
            )
