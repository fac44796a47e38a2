"""Compiles kernels for an H100 on a machine without one, and reads what the assembler reports.

Needs the packages of the `aot` extra: jax's CUDA plugin and NVIDIA's assembler, but no driver.
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.mosaic_gpu import Target, traced_for

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 14 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """What the assembler reports of one kernel.

    Attributes:
      name: the kernel's entry function.
      registers: per thread at the start; `set_max_registers` moves them between warpgroups.
      spill_bytes: stored to and loaded from local memory for want of registers.
      stack_bytes: the stack frame.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def lower_for_h100(fn: Callable, *args: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """Lowers `fn`, with the kernels it calls, for an H100.

    Args:
      fn: function of arrays.
      *args: shapes and dtypes of its arguments.
    """
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated) for a in args]
    with traced_for(Target()):
        return jax.jit(fn).lower(*placed)


def compile_for_h100(fn: Callable, *args: jax.ShapeDtypeStruct) -> tuple[KernelResources, ...]:
    """Compiles `fn`, with the kernels it calls, to sm_90a machine code.

    Args:
      fn: function of arrays.
      *args: shapes and dtypes of its arguments.

    Returns:
      The resources of each Mosaic GPU kernel in it, in the order of compilation. A kernel that
      takes more shared memory than a thread block may have does not compile.

    Raises:
      RuntimeError: the assembler reported fewer kernels than `fn` has, because some cache had them
        compiled: nothing would be known of those.
    """
    with _assembler_report() as report:
        lowered = lower_for_h100(fn, *args)
        lowered.compile()
    kernels = _parse(report[0])
    # By hash, for XLA may merge calls of the same kernel.
    number = len(set(re.findall('kernel_hash = "([^"]*)"', lowered.as_text())))
    if len(kernels) < number:
        raise RuntimeError(
            f"the assembler reported {len(kernels)} of {number} kernels: turn the compilation "
            "cache off, or compile them in a process of their own"
        )
    return kernels


@contextlib.contextmanager
def _assembler_report() -> Iterator[list[str]]:
    """Yields a list that afterwards holds what the assembler printed to the process's stdout."""
    report: list[str] = []
    before = os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield report
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
            else:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = before
            file.seek(0)
            report.append(file.read().decode(errors="replace"))


def _parse(report: str) -> tuple[KernelResources, ...]:
    kernels = []
    for part in report.split("Compiling entry function ")[1:]:
        stack, stored, loaded = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        (registers,) = _numbers(r"Used (\d+) registers", part)
        kernels.append(KernelResources(part.split("'")[1], registers, stored + loaded, stack))
    return tuple(kernels)


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler's report has no line like {pattern!r}: {text[:200]}")
    return tuple(int(number) for number in found.groups())
