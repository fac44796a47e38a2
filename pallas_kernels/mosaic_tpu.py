"""Where the Mosaic TPU kernels run, and the facts of the chips that they are cut to.

Words used in the kernels: HBM is the device's memory, VMEM a core's vector memory, SMEM its scalar
memory; the *MXU* multiplies matrices; a vector register has 8 *sublanes* of 128 *lanes*.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tracing import GivenTarget

LANES = 128
SUBLANES = 8

# Exponentials are powers of two: scores are multiplied by it.
LOG2E = math.log2(math.e)
# A score that a query does not see: finite, so that a difference of two is no NaN.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel's shape depends on, and what its floors are computed from; per jax device.

    Attributes:
      name: as in "v5p".
      device_kind: `jax.Device.device_kind`, the key of the tuned table.
      topology: the smallest one that can be compiled for, by its name for
        `jax.experimental.topologies`.
      num_cores: cores that share one jax device; a grid's parallel axes are spread over them.
      vmem_bytes: of one core.
      hbm_bytes: of the device.
      bytes_per_second: from and to HBM.
      bf16_flops: per second.
      int8_ops: per second; 0 where the MXU has no 8-bit integers.
      mxu_size: rows and columns of an MXU.
    """

    name: str
    device_kind: str
    topology: str
    num_cores: int
    vmem_bytes: int
    hbm_bytes: int
    bytes_per_second: float
    bf16_flops: float
    int8_ops: float
    mxu_size: int


_MIB, _GIB = 2**20, 2**30

# Figures per device from Google's system pages: a v7x chip is two devices of one core each, a v5p
# device is two cores.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            "TPU v5 lite",
            "v5e:2x2",
            1,
            128 * _MIB,
            16 * _GIB,
            8.19e11,
            1.97e14,
            3.94e14,
            128,
        ),
        Chip("v5p", "TPU v5", "v5p:2x2x1", 2, 64 * _MIB, 95 * _GIB, 2.76e12, 4.59e14, 9.18e14, 128),
        Chip(
            "v6e",
            "TPU v6 lite",
            "v6e:2x2",
            1,
            128 * _MIB,
            32 * _GIB,
            1.64e12,
            9.18e14,
            1.84e15,
            256,
        ),
        Chip("v7x", "TPU7x", "tpu7x:2x2x1", 1, 64 * _MIB, 96 * _GIB, 3.7e12, 1.15e15, 0.0, 256),
    )
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is traced for.

    Attributes:
      chip: its tile sizes come from here.
      interpret: False for the chip itself, else the interpreter on a CPU: True for the one of plain
        XLA, `pltpu.InterpretParams` for the one that has memories, semaphores and races.
    """

    chip: Chip
    interpret: bool | pltpu.InterpretParams = False


_given: GivenTarget[Target] = GivenTarget()
traced_for = _given.traced_for


def current_target() -> Target:
    """The target of kernels traced now.

    Raises:
      NotImplementedError: the default device is no TPU, or one that the kernels have no facts of.
    """
    given = _given.get()
    if given is not None:
        return given
    device = jax.devices()[0]
    if device.platform != "tpu":
        raise NotImplementedError(f"Mosaic TPU kernels need a TPU, this is {device.platform!r}")
    for chip in CHIPS.values():
        if chip.device_kind == device.device_kind:
            return Target(chip)
    raise NotImplementedError(
        f"Mosaic TPU kernels know {', '.join(CHIPS)}, this is a {device.device_kind!r}"
    )


def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The float32 products of a's rows with b, summed over a's last axis and b's given one.

    Float32 factors are multiplied as such, in several passes of bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def across(rows: jax.Array, width: int) -> jax.Array:
    """Values that are the same in all lanes of a row, [rows, LANES], over `width` lanes."""
    return jnp.tile(rows, (1, -(-width // LANES)))[:, :width]


def in_hbm(*arrays: jax.Array, target: Target) -> tuple[jax.Array, ...]:
    """The arrays, which a kernel copies from piece by piece, where they are expected.

    XLA moves small ones into vector memory before a kernel, whatever space the kernel asks for, and
    a copy within that memory is no transfer but a loop of loads and stores.
    """
    if target.interpret:
        return arrays
    return tuple(pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in arrays)
