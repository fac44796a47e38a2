"""A copy from shared to device memory that leaves the L2 cache to others.

What a kernel writes once and does not read would push out of the cache what it does read again.
Mosaic GPU's own copies have no cache hint, so the instruction is written out here.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_kernels.mosaic_gpu import Target, swizzled

# One thread copies a box of the tensor, and its lines are the first to leave the cache.
_COPY = """{
.reg .b64 policy;
createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
@$0 cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint
    [$1, {$3, $3, $3, $3, $4}], [$2], policy;
}"""


def copy_streaming(source, results, tile, target: Target) -> None:
    """Starts the copy of `source` to `results[tile]`, in a group of its own.

    Args:
      source: [rows, columns] in shared memory with the layout `swizzled(dtype)`.
      results: [tiles, rows, columns] in device memory, 16-bit.
      tile: which of them.
      target: the interpreter has no caches and makes an ordinary copy.
    """
    if target.interpret is not None:
        plgpu.copy_smem_to_gmem(source, results.at[tile])
        return
    (layout, _) = swizzled(results.dtype)
    _, rows, columns = results.shape
    box = 1, rows // layout.tiling[0], columns // layout.tiling[1], *layout.tiling

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(swizzled(results.dtype)),
            plgpu.RefType(),
            plgpu.Layout.WG_SPLAT,
        )
    )
    def copy(context, source, results, tile):
        tiling = (mgpu.TileTransform(layout.tiling),)
        tensor = context._get_tma_desc(results, tiling, None, box, 128, None)
        operands = [
            mgpu.utils.single_thread_predicate(mgpu.utils.ThreadSubset.WARPGROUP),
            tensor,
            mgpu.utils.memref_ptr(source),
            mgpu.c(0, ir.IntegerType.get_signless(32)),
            tile.registers.item(),
        ]
        nothing = ir.Type.parse("!llvm.void")
        llvm.inline_asm(nothing, operands, _COPY, "b,l,r,r,r", has_side_effects=True)
        nvvm.cp_async_bulk_commit_group()

    copy(source, results, tile)
