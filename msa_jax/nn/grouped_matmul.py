"""Matmuls of sorted token groups with one weight matrix per group.

`jax.lax.ragged_dot` is the operation. XLA for CPU expands it to one dense matmul over all rows per
group, so on CPU rows are laid out in tiles of one group each and multiplied as a batch (8 groups:
3.6 times faster, see `experiments.benchmark_reference`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_TILE_ROWS = 64

type GroupedMatmul = Callable[[Float[Array, "..."], Float[Array, "E K N"]], Float[Array, "..."]]


def apply_grouped(
    fn: Callable[[Float[Array, "..."], GroupedMatmul], Float[Array, "..."]],
    x: Float[Array, "M K"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Runs `fn(rows, matmul)`, where `matmul(rows, w)` multiplies each group by its own matrix.

    Args:
      fn: a function of rows that is elementwise but for its calls of `matmul`.
      x: rows sorted by group; the rows behind the last group belong to nobody.
      group_sizes: rows of each group.
      implementation: "ragged_dot", "tiles", or None for the best on this platform.

    Returns:
      fn's result for every row; 0 for rows behind the last group.
    """
    if implementation is None:
        implementation = "tiles" if _platform() == "cpu" else "ragged_dot"
    owned = jnp.arange(len(x)) < group_sizes.sum()
    if implementation == "ragged_dot":
        y = fn(x, lambda rows, w: jax.lax.ragged_dot(rows, w, group_sizes))
    elif implementation == "tiles":
        y = _apply_in_tiles(fn, x, group_sizes)
    else:
        raise ValueError(f"implementation={implementation!r}: choose ragged_dot or tiles")
    return jnp.where(owned[:, None], y, 0)


def _platform() -> str:
    """What is traced for: the mesh's devices, which need not be this machine's, or the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _apply_in_tiles(fn, x, group_sizes):
    """Every group starts on a tile of its own; E more tiles than full ones always suffice."""
    num_rows, num_groups = len(x), len(group_sizes)
    tiles_of_group = -(-group_sizes // _TILE_ROWS)
    last_tile, last_row = jnp.cumsum(tiles_of_group), jnp.cumsum(group_sizes)
    num_tiles = num_rows // _TILE_ROWS + num_groups
    rows = jnp.arange(num_rows)
    group_of_row = jnp.minimum(jnp.searchsorted(last_row, rows, side="right"), num_groups - 1)
    first_tile = last_tile - tiles_of_group
    place = first_tile[group_of_row] * _TILE_ROWS + rows - (last_row - group_sizes)[group_of_row]
    place = jnp.where(rows < last_row[-1], place, num_tiles * _TILE_ROWS)  # nobody's: out of range
    tiles = jnp.zeros((num_tiles * _TILE_ROWS, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
    group_of_tile = jnp.searchsorted(last_tile, jnp.arange(num_tiles), side="right")
    group_of_tile = jnp.minimum(group_of_tile, num_groups - 1)

    def matmul(tiles, w):
        return jnp.einsum("tmk,tkn->tmn", tiles, w[group_of_tile])

    y = fn(tiles.reshape(num_tiles, _TILE_ROWS, -1), matmul)
    return y.reshape(num_tiles * _TILE_ROWS, -1).at[place].get(mode="fill", fill_value=0)
