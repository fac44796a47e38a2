"""A number that the compiler cannot see through, so that it computes addresses where they are used.

What does not change in a loop the compiler computes before it. Addresses of many operands would
then take registers for the whole loop that accumulators need; they spill, and are loaded again one
by one. An index made opaque inside the loop keeps them there.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu import Target


def opaque(number: jax.Array, target: Target) -> jax.Array:
    """The same int32 scalar; on the GPU computed anew, as far as the compiler knows."""
    if target.interpret is not None:
        return number

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT),
    )
    def copy(_, number):
        i32 = ir.IntegerType.get_signless(32)
        operands = [number.registers.item()]
        copied = llvm.inline_asm(i32, operands, "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
        assert isinstance(copied, ir.Value)
        return mgpu.FragmentedArray.splat(copied, (), is_signed=True)

    return copy(number)
