"""The gradient of the index keys on Hopper, from those of the index scores.

A worker, a consumer warpgroup with a producer of its own, takes a part of a key block's tiles, of
all groups and in order, and adds up gradient^T @ index queries in registers. XLA adds the parts:
no atomics, the same bits in every run.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.tiles import KEY_BLOCK, ROW_TILE, TILE_QUERIES, Tiles
from pallas_kernels.mosaic_gpu import SHARED_MEMORY_BYTES, Target, current_target, swizzled

_PRODUCER_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class IndexKConfig:
    """Shape of the kernel.

    Attributes:
      num_workers: per thread block, 1 or 2.
      num_slots: tiles in flight per worker.
      num_parts: that the tiles of a key block are cut into, so that several workers share a block
        picked by everybody.
      num_thread_blocks: that share the parts; one per core of the GPU.
    """

    num_workers: int = 2
    num_slots: int = 3
    num_parts: int = 4
    num_thread_blocks: int = 132

    def __post_init__(self):
        if self.num_workers not in (1, 2):
            raise ValueError(f"num_workers={self.num_workers} must be 1 or 2: registers are few")
        for field in ("num_slots", "num_parts", "num_thread_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def check(self, width: int, block_size: int) -> None:
        """Raises ValueError if tiles and result do not fit into a core's shared memory."""
        tiles = self.num_slots * TILE_QUERIES * (width + block_size) * 2
        needed = self.num_workers * tiles + 1024
        if needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"num_workers={self.num_workers} with num_slots={self.num_slots} need {needed} "
                f"bytes of shared memory, there are {SHARED_MEMORY_BYTES}; lower one of them"
            )


def index_k_gradient(
    gradients: Float[Array, "M 64 Bk"],
    index_q: Float[Array, "R 64 W"],
    tiles: Tiles,
    num_blocks: int,
    config: IndexKConfig,
) -> Float[Array, "keys W"]:
    """Gradient of all index keys in float32.

    Args:
      gradients: of the tiles' index scores, 0 in rows of nobody.
      index_q: by row.
      tiles: see there.
      num_blocks: in all.
      config: the kernel's shape.
    """
    target = current_target()
    block_size, width = gradients.shape[-1], index_q.shape[-1]
    config.check(width, block_size)
    order, starts = _by_block(tiles, num_blocks)
    items = num_blocks * config.num_parts
    statics = _Statics(items, config, target)
    parts = plgpu.kernel(
        functools.partial(_kernel, statics),
        out_type=jax.ShapeDtypeStruct((items, block_size, width), jnp.float32),
        scratch_types=_scratch(config, block_size, width, index_q.dtype),
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=2 * config.num_workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name="index_k_gradient",
    )(gradients, index_q, order, tiles.tiles[:, ROW_TILE], starts)
    parts = parts.reshape(num_blocks, config.num_parts, block_size, width)
    return parts.sum(1).reshape(num_blocks * block_size, width)


def _by_block(tiles: Tiles, num_blocks: int) -> tuple[Int[Array, "M"], Int[Array, "boundaries"]]:
    """The tiles in the order of their key block, and where each block's start."""
    used = jnp.arange(len(tiles.tiles), dtype=jnp.int32) < tiles.num_tiles
    block = jnp.where(used, tiles.tiles[:, KEY_BLOCK], num_blocks)
    order = jnp.argsort(block, stable=True).astype(jnp.int32)
    first = jnp.arange(num_blocks + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(block[order], first, method="scan_unrolled")
    return order, starts.astype(jnp.int32)


class _Statics(NamedTuple):
    """What the kernel is compiled for: how many parts in all, its shape, its target."""

    items: int
    config: IndexKConfig
    target: Target


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, by worker."""

    gradients: Any
    index_q: Any
    full: Any
    empty: Any


class _Refs(NamedTuple):
    """Arrays in device memory."""

    gradients: Any
    index_q: Any
    order: Any
    row_tiles: Any
    starts: Any
    parts: Any


def _scratch(config: IndexKConfig, block_size: int, width: int, dtype) -> tuple:
    workers, slots = config.num_workers, config.num_slots

    def matrices(columns):
        shape = workers, slots, TILE_QUERIES, columns
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    return tuple(
        _Scratch(
            gradients=matrices(block_size),
            index_q=matrices(width),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=(workers, slots)),
            empty=plgpu.Barrier(num_barriers=(workers, slots)),
        )
    )


def _kernel(statics: _Statics, *refs):
    """Consumers first, then as many producers."""
    workers = statics.config.num_workers
    inputs, smem = _Refs(*refs[:6]), _Scratch(*refs[6:])
    warpgroup = lax.axis_index("warpgroup")
    registers = min(232, 512 // workers - _PRODUCER_REGISTERS)

    @pl.when(warpgroup < workers)
    def _():
        plgpu.set_max_registers(registers // 8 * 8, action="increase")
        _consume(statics, inputs, smem, warpgroup)

    @pl.when(warpgroup >= workers)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(statics, inputs, smem, warpgroup - workers)


def _for_each_part(statics: _Statics, refs: _Refs, worker, visit):
    """visit(item, first tile, one past its last, tiles before) for a worker's parts, in order.

    Returns how many tiles there were.
    """
    config = statics.config
    first = lax.axis_index("thread_block") * config.num_workers + worker
    stride = config.num_thread_blocks * config.num_workers

    def step(n, before):
        item = first + n * stride
        block, part = lax.div(item, config.num_parts), lax.rem(item, config.num_parts)
        start = refs.starts[block]
        count = refs.starts[block + 1] - start
        begin = start + lax.div(count * part, config.num_parts)
        end = start + lax.div(count * (part + 1), config.num_parts)
        visit(item, begin, end, before)
        return before + (end - begin)

    num_items = lax.div(statics.items - first + (stride - 1), stride)
    return lax.fori_loop(0, num_items, step, jnp.int32(0))


def _produce(statics: _Statics, refs: _Refs, smem: _Scratch, worker):
    """Keeps the worker's slots full."""
    slots = statics.config.num_slots

    def visit(item, begin, end, before):
        @pl.loop(begin, end)
        def _(n):
            number = before + n - begin
            slot = lax.rem(number, slots)
            pl.when(number >= slots)(lambda: plgpu.barrier_wait(smem.empty.at[worker, slot]))
            tile = refs.order[n]
            full = smem.full.at[worker, slot]
            plgpu.copy_gmem_to_smem(refs.gradients.at[tile], smem.gradients.at[worker, slot], full)
            plgpu.copy_gmem_to_smem(
                refs.index_q.at[refs.row_tiles[tile]], smem.index_q.at[worker, slot], full
            )

    num_tiles = _for_each_part(statics, refs, worker, visit)

    # The last releases are awaited too: a thread block ends when nothing uses its shared memory.
    @pl.loop(jnp.maximum(num_tiles - slots, 0), num_tiles)
    def _(number):
        plgpu.barrier_wait(smem.empty.at[worker, lax.rem(number, slots)])


def _consume(statics: _Statics, refs: _Refs, smem: _Scratch, worker):
    """Adds up the worker's parts."""
    slots = statics.config.num_slots
    _, block_size, width = refs.parts.shape

    def visit(item, begin, end, before):
        def add_up(accumulator):
            @pl.loop(begin, end)
            def _(n):
                slot = lax.rem(before + n - begin, slots)
                plgpu.barrier_wait(smem.full.at[worker, slot])
                gradients = smem.gradients.at[worker, slot].transpose((1, 0))
                plgpu.wgmma(accumulator, gradients, smem.index_q.at[worker, slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem.empty.at[worker, slot])

            return accumulator[...]

        total = pl.run_scoped(add_up, plgpu.ACC((block_size, width), jnp.float32))
        refs.parts.at[item][...] = total

    _for_each_part(statics, refs, worker, visit)
