"""What compiling for an H100 on a machine without one reports, on kernels made for the purpose."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ahead_of_time
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.mosaic_gpu import SHARED_MEMORY_BYTES, matmul, swizzled


def _products(number, columns=256, name="products"):
    """A kernel whose block keeps `number` matrix products in registers at once.

    A product takes columns / 2 of the 255 registers that a thread may have. The last one decides
    what the others are multiplied by, so none can be finished before it.
    """

    def kernel(a_gmem, b_gmem, o_gmem, a, b, o, barrier):
        for source, target in ((a_gmem, a), (b_gmem, b)):
            plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)
        products = [matmul(a, b.at[n], (64, columns)) for n in range(number)]
        factor = jax.lax.broadcast_in_dim(jnp.max(products[-1], axis=1), (64, columns), (0,))
        o[...] = sum(product * factor for product in products)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o, o_gmem)
        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = name
    operand = swizzled(jnp.bfloat16)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, columns), jnp.float32),
        grid=(1,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=operand),
            plgpu.SMEM((number, 64, columns), jnp.bfloat16, transforms=operand),
            plgpu.SMEM((64, columns), jnp.float32),
            plgpu.Barrier(),
        ],
    )


def _operands(number, columns=256):
    shapes = ((64, 64), (number, 64, columns))
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.fast
def test_a_kernel_that_fits_has_registers_and_no_spills():
    (kernel,) = compile_for_h100(_products(1), *_operands(1))
    assert kernel.name.startswith("products")
    assert 128 < kernel.registers <= 255
    assert kernel.spill_bytes == kernel.stack_bytes == 0


def test_a_kernel_with_too_many_live_values_spills():
    (kernel,) = compile_for_h100(_products(3), *_operands(3))
    assert kernel.registers == 255
    # Three products are 384 registers of 4 bytes, stored and loaded.
    assert kernel.spill_bytes >= 4 * (384 - 255)
    assert kernel.stack_bytes > 0


def test_every_kernel_of_a_function_is_reported():
    first, second = _products(1, name="first"), _products(2, columns=64, name="second")

    def both(a, b, c):
        return first(a, b), second(a, c)

    a, b = _operands(1)
    reports = compile_for_h100(both, a, b, _operands(2, columns=64)[1])
    assert sorted(kernel.name.split("_")[0] for kernel in reports) == ["first", "second"]


def test_a_kernel_compiled_before_is_reported_again():
    reports = [compile_for_h100(_products(1, columns=64), *_operands(1, 64)) for _ in range(2)]
    assert len(reports[0]) == 1
    assert reports[0] == reports[1]


def test_a_kernel_missing_from_the_report_is_an_error(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_parse", lambda report: ())
    with pytest.raises(RuntimeError, match="reported 0 of 1 kernels: turn the compilation cache"):
        compile_for_h100(_products(1, columns=64), *_operands(1, 64))


def test_shared_memory_beyond_a_blocks_share_does_not_compile():
    def copy(source, target, staging, barrier):
        plgpu.copy_gmem_to_smem(source, staging, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(staging, target)
        plgpu.wait_smem_to_gmem(0)

    def compiled_with(rows):
        array = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
        scratch = [plgpu.SMEM(array.shape, array.dtype), plgpu.Barrier()]
        kernel = plgpu.kernel(
            copy, out_type=array, grid=(1,), grid_names=("block",), scratch_types=scratch
        )
        return compile_for_h100(kernel, array)

    rows = SHARED_MEMORY_BYTES // (256 * 4)
    assert len(compiled_with(rows - 8)) == 1
    with pytest.raises(Exception, match=r"(?i)shared memory"):
        compiled_with(rows + 8)
