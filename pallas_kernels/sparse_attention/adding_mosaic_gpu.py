"""Additions to device memory that the L2 cache makes, so that nobody waits for what was there.

Loaded, added and stored, a slice's sums would come back from memory while the tensor cores idle.
The instruction is an atomic one and could be issued by many; here each number is added to by one
warpgroup of a kernel, so the order of additions is that of the kernels, the same in every run.
"""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic_gpu import MATRIX, Target

_ADD = "red.global.relaxed.gpu.add.v2.f32 [$0], {$1, $2};"


def add_to(sums: jax.Ref, first: jax.Array, group: jax.Array, new: jax.Array, target: Target):
    """Adds `new` to `sums[first:first + rows, group]`.

    Args:
      sums: [keys, groups, columns] float32 in device memory.
      first: the first of the keys.
      group: which group.
      new: [rows, columns] in the layout of a product's result.
      target: the interpreter loads, adds and stores.
    """
    rows, _ = new.shape
    if target.interpret is not None:
        whole = sums.at[pl.ds(first, rows), group]
        whole[...] = whole[...] + new
        return

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT, MATRIX)
    )
    def add(_, sums, first, group, new):
        index = ir.IndexType.get()
        at = [arith.index_cast(index, number.registers.item()) for number in (first, group)]
        rows, columns = new.shape
        part = mgpu.utils.memref_slice(sums, (mgpu.ds(at[0], rows), at[1]))
        part = mgpu.utils.memref_reshape(part, (1, 1, rows, columns))
        array: Any = mgpu.FragmentedArray
        places = array.transfer_tiled(part, 16, new.layout, new.shape, False)
        for get, _, _, pointer in places:
            pair = get(new.registers)
            pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)
            operands = [pointer, *(vector.extract(pair, [], [i]) for i in range(2))]
            nothing = ir.Type.parse("!llvm.void")
            llvm.inline_asm(nothing, operands, _ADD, "l,f,f", has_side_effects=True)

    add(sums, first, group, new)
