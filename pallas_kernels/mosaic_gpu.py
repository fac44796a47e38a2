"""Where the Mosaic GPU kernels run, and the idioms of NVIDIA Hopper that they share.

Words used in the kernels: a *warpgroup* is 128 threads, the unit that issues a `wgmma` matrix
product; *consumers* are the warpgroups that compute, the *producer* is the one that only starts
copies. A copy between GMEM (device memory) and SMEM (a core's shared memory) runs by itself and
reports to a barrier.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tracing import GivenTarget

# Shared memory that one thread block may take on sm_90, and registers per thread position (lane)
# over the warpgroups of a block: 64K registers / 128 threads.
SHARED_MEMORY_BYTES = 232_448
REGISTERS_PER_LANE = 512

# How a matrix product's result lies over a warpgroup's registers, and a vector of one value per row
# of it.
MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is traced for: the GPU, or with `interpret` the interpreter on a CPU."""

    interpret: plgpu.InterpretGPUParams | None = None


_given: GivenTarget[Target] = GivenTarget()
traced_for = _given.traced_for


def current_target() -> Target:
    """The target of kernels traced now.

    Raises:
      NotImplementedError: the default device is not a Hopper GPU.
    """
    given = _given.get()
    if given is not None:
        return given
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(
            f"Mosaic GPU kernels need an NVIDIA Hopper GPU, this is {device.platform!r}"
        )
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        raise NotImplementedError(
            f"Mosaic GPU kernels are written for Hopper (compute capability 9.0), this "
            f"{device.device_kind} has {capability}"
        )
    return Target()


def swizzled(dtype: jax.typing.DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of a matrix operand in shared memory: 8 rows x 128 bytes, swizzled."""
    return (
        plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(128),
    )


def producer_registers(num_consumers: int) -> int:
    """Registers per thread of the producer beside so many consumers."""
    return 32 if num_consumers == 3 else 40


def consumer_registers(num_consumers: int) -> int:
    """Registers per thread of a consumer: its share of what the producer leaves, in eights."""
    share = (REGISTERS_PER_LANE - producer_registers(num_consumers)) // num_consumers
    return min(232, share // 8 * 8)


def run_roles(
    num_consumers: int, consume: Callable[[jax.Array], None], produce: Callable[[], None]
) -> None:
    """Runs consume(its number) in every warpgroup but the last, and produce() in that one."""
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < num_consumers)
    def _():
        plgpu.set_max_registers(consumer_registers(num_consumers), action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == num_consumers)
    def _():
        plgpu.set_max_registers(producer_registers(num_consumers), action="decrease")
        produce()


def matmul(a, b, shape: tuple[int, int], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """a @ b of operands in shared memory, awaited."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, dtype))


def matmul_add(accumulator: jax.Array, a: jax.Array, b, staging, target: Target) -> Any:
    """accumulator + a @ b with a in registers and b in shared memory, awaited.

    The interpreter can neither continue an accumulator nor take a from registers: there a goes
    through `staging`, a shared memory reference of a's shape (unused on the GPU).
    """
    if target.interpret is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(accumulator))
    staging[...] = a
    plgpu.commit_smem()
    rows, columns = accumulator.shape
    return accumulator + matmul(staging, b, (rows, columns), accumulator.dtype)


def full_rows(size: int, value: float, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """A constant vector of one value per row of a matrix product."""
    return plgpu.layout_cast(jnp.full((size,), value, dtype), ROWS)


def by_rows(rows: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Broadcasts one value per row over the columns."""
    return jax.lax.broadcast_in_dim(rows, shape, (0,))
