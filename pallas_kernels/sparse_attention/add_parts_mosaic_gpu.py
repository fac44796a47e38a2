"""Adds what the slices of split lists summed up to the whole dK and dV, on Hopper.

A key block whose list of queries was cut into several slices has one partial sum per slice. They
are added in the order of the slices, so that the bits do not depend on which came first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import current_target
from pallas_kernels.sparse_attention.reverse_index import GROUP, KEY_BLOCK, NUM_PARTS, SLOT

# Keys per thread block: few, so that a block which everybody picked is shared by many cores.
_KEYS = 16

# Slices per thread block: most have nothing to add, and a thread block for each would take longer
# to start than to find that out.
_SLICES = 16


def add_parts(
    parts: Float[Array, "slots 2 Bk D"],
    slices: Int[Array, "items fields"],
    dk: jax.Ref,
    dv: jax.Ref,
) -> None:
    """Adds the parts of each split list to its block's keys.

    Args:
      parts: of dK and of dV, by slot.
      slices: `ReverseIndex.slices`; no two lists are of the same block and group.
      dk: [keys, Hkv, D] float32.
      dv: [keys, Hkv, D] float32.
    """
    target = current_target()
    block_size, num_slices = parts.shape[2], len(slices)
    # The last axis is the GPU's first, the only one of more than 65,535 places. A kernel returns
    # something; nobody reads this.
    plgpu.kernel(
        functools.partial(_kernel, block_size, num_slices),
        out_type=jax.ShapeDtypeStruct((1,), jnp.int32),
        grid=(block_size // _KEYS, -(-num_slices // _SLICES)),
        grid_names=("piece", "run"),
        interpret=target.interpret,
        kernel_name="add_parts",
    )(parts, slices, dk, dv)


def _kernel(block_size: int, num_slices: int, parts: Any, slices: Any, dk: Any, dv: Any, _: Any):
    """Some keys of the lists that a run of slices has the first slices of."""
    first = lax.axis_index("piece") * _KEYS
    run = lax.axis_index("run") * _SLICES

    def add_list(item, count):
        slot, group = slices[item, SLOT], slices[item, GROUP]
        keys = pl.ds(slices[item, KEY_BLOCK] * block_size + first, _KEYS)
        for i, sums in enumerate((dk, dv)):

            def add(n, total, i=i):
                return total + parts[slot + n, i, pl.ds(first, _KEYS)]

            sums[keys, group] = lax.fori_loop(0, count, add, sums[keys, group])

    @pl.loop(run, jnp.minimum(run + _SLICES, num_slices))
    def _(item):
        count = slices[item, NUM_PARTS]
        pl.when(count > 0)(lambda: add_list(item, count))
