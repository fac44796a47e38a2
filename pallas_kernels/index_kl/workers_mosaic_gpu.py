"""Workers, the form of the KL kernels on Hopper: a consumer warpgroup with a producer of its own.

A thread block runs one worker or two, which share nothing but the core. All thread blocks' workers
take the items of a kernel in turn, by their number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import REGISTERS_PER_LANE, SHARED_MEMORY_BYTES, Target

_PRODUCER_REGISTERS = 32


def check_workers(config: Any, *counts: str) -> None:
    """Raises ValueError if a kernel's config has other than 1 or 2 workers, or none of `counts`."""
    if config.num_workers not in (1, 2):
        raise ValueError(f"num_workers={config.num_workers} must be 1 or 2: registers are few")
    for field in counts:
        if getattr(config, field) < 1:
            raise ValueError(f"{field}={getattr(config, field)} must be at least 1")


def check_shared_memory(config: Any, bytes_per_worker: int) -> None:
    """Raises ValueError if the workers' tiles do not fit into a core's shared memory."""
    # Barriers and the alignment of tiles take less than the last kilobyte.
    needed = config.num_workers * bytes_per_worker + 1024
    if needed > SHARED_MEMORY_BYTES:
        raise ValueError(
            f"num_workers={config.num_workers} with num_slots={config.num_slots} need {needed} "
            f"bytes of shared memory, there are {SHARED_MEMORY_BYTES}; lower one of them"
        )


def workers_kernel(
    body: Callable, name: str, config: Any, target: Target, *, out_type: Any, scratch: tuple
) -> Callable:
    """The kernel that runs body(*references) in the warpgroups of `config`'s workers."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=2 * config.num_workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name=name,
    )


def run_workers(
    num_workers: int, consume: Callable[[jax.Array], None], produce: Callable[[jax.Array], None]
) -> None:
    """Runs consume(worker) in the first warpgroups and produce(worker) in as many others."""
    warpgroup = lax.axis_index("warpgroup")
    registers = min(232, REGISTERS_PER_LANE // num_workers - _PRODUCER_REGISTERS)

    @pl.when(warpgroup < num_workers)
    def _():
        plgpu.set_max_registers(registers // 8 * 8, action="increase")
        consume(warpgroup)

    @pl.when(warpgroup >= num_workers)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce(warpgroup - num_workers)


def items_of(config: Any, worker: jax.Array, num_items: Any) -> tuple[jax.Array, int, jax.Array]:
    """A worker's first item, the step from one to the next, and how many are its own."""
    stride = config.num_thread_blocks * config.num_workers
    first = lax.axis_index("thread_block") * config.num_workers + worker
    return first, stride, lax.div(num_items - first + (stride - 1), stride)


def wait_for_slot(empty: Any, worker: jax.Array, use: jax.Array, num_slots: int) -> None:
    """Waits until the ring's slot of this use, counted from 0, has been released by the last."""

    @pl.when(use >= num_slots)
    def _():
        plgpu.barrier_wait(empty.at[worker, lax.rem(use, num_slots)])


def drain(empty: Any, worker: jax.Array, uses: jax.Array, num_slots: int) -> None:
    """Awaits the last releases too: a thread block ends when nothing uses its shared memory."""

    @pl.loop(jnp.maximum(uses - num_slots, 0), uses)
    def _(use):
        plgpu.barrier_wait(empty.at[worker, lax.rem(use, num_slots)])
