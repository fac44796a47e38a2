"""Where the Triton kernels run, and how they are launched: any NVIDIA GPU from Ampere on.

jax-triton (extra `triton`) is optional, and `@triton.jit` needs Triton when a kernel is defined:
modules that define kernels, `<op>/*_triton.py`, are imported by the op that runs them, never
before. Kernels are marked `no_type_check`, since Triton compiles their source: run-time checks of
the annotations, as the tests have, would hide it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tracing import GivenTarget

MIN_CAPABILITY = 80
MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16", "float32")
# Bytes of one tile of keys or of values. Two of each are in flight, and the 100 KB of shared memory
# that a core of an Ada GPU has must hold them beside what else a kernel keeps there.
TILE_BYTES = 16 * 1024

type Interpreter = Callable[..., tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
      compute_capability: of the GPU, 80 for 8.0.
      interpreter: runs kernels on the host instead, for tests: called with the kernel, its grid,
        the output shapes, the constants and then its input arrays; returns the outputs.
    """

    compute_capability: int
    interpreter: Interpreter | None = None


_given: GivenTarget[Target] = GivenTarget()
traced_for = _given.traced_for


def current_target() -> Target:
    """The target of kernels traced now.

    Raises:
      NotImplementedError: the default device is not an NVIDIA GPU from Ampere on, or jax-triton
        does not load.
    """
    given = _given.get()
    if given is not None:
        return given
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NotImplementedError(f"Triton kernels need an NVIDIA GPU, this is {device.platform!r}")
    number = str(getattr(device, "compute_capability", "unknown")).replace(".", "")
    if not number.isdigit() or int(number) < MIN_CAPABILITY:
        raise NotImplementedError(
            f"Triton kernels need an NVIDIA GPU of compute capability {MIN_CAPABILITY / 10} or "
            f"more, this {device.device_kind} has {number}"
        )
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(
            f"jax-triton does not load ({error}): install the extra, pip install 'msa-jax[triton]'"
        ) from error
    return Target(int(number))


def launch(
    kernel: Any,
    *arrays: jax.Array,
    out: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int] | tuple[int, int, int],
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs a kernel on row-major arrays.

    Args:
      kernel: takes pointers to the arrays, then to the outputs, then the constants by name.
      *arrays: its inputs.
      out: shapes of its outputs; what it does not write may hold anything.
      grid: numbers of programs.
      num_warps: per program.
      num_stages: how deep loads of a loop run ahead.
      **constants: compiled into the kernel.
    """
    target = current_target()
    if target.interpreter is not None:
        interpret = target.interpreter

        def run(*inputs):
            return interpret(kernel, grid, out, constants, *inputs)

        return tuple(jax.pure_callback(run, out, *arrays))
    import jax_triton

    return tuple(
        jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            out_shape=out,
            grid=grid,
            name=kernel.fn.__name__,
            compute_capability=target.compute_capability,
            num_warps=num_warps,
            num_stages=num_stages,
            **constants,
        )
    )


def check_served(block_size: int, **arrays: jax.Array) -> None:
    """Raises NotImplementedError for dtypes and sizes that no Triton kernel here is written for.

    Args:
      block_size: Bk.
      **arrays: queries, keys and values by name; their last axis is a head or index dim.
    """
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise NotImplementedError(
            f"Triton kernels take {', '.join(arrays)} in one dtype of {', '.join(DTYPES)}, not "
            f"{', '.join(sorted(dtypes))}"
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise NotImplementedError(
            f"block_size={block_size}: Triton kernels take powers of two from 16 on"
        )
    for name, array in arrays.items():
        if not 1 <= array.shape[-1] <= MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{name} has {array.shape[-1]} dims per head, Triton kernels take up to "
                f"{MAX_HEAD_DIM}"
            )


def padded(size: int) -> int:
    """The next power of two, at least 16: what a tile's axis of that size takes."""
    return max(16, 1 << (size - 1).bit_length())


def key_tile(block_size: int, width: int, dtype: jax.typing.DTypeLike) -> int:
    """Keys of a block that one step takes, so that their tile has `TILE_BYTES` or less.

    Args:
      block_size: Bk, a power of two.
      width: padded dims of a key.
      dtype: of the keys.
    """
    return min(block_size, max(16, TILE_BYTES // (width * jnp.dtype(dtype).itemsize)))
