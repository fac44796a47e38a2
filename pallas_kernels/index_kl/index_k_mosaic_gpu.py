"""The gradient of the index keys on Hopper, from those of the index scores.

A worker takes a part of a key block's tiles, of all groups and in order, and adds up
gradient^T @ index queries in registers. XLA adds the parts: no atomics, the same bits in every run.
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
from pallas_kernels.index_kl.workers_mosaic_gpu import (
    check_shared_memory,
    check_workers,
    drain,
    items_of,
    run_workers,
    wait_for_slot,
    workers_kernel,
)
from pallas_kernels.mosaic_gpu import current_target, swizzled


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
        check_workers(self, "num_slots", "num_parts", "num_thread_blocks")

    def check(self, width: int, block_size: int) -> None:
        """Raises ValueError if the tiles in flight do not fit into a core's shared memory."""
        check_shared_memory(self, self.num_slots * TILE_QUERIES * (width + block_size) * 2)


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
    statics = _Statics(items, config)
    kernel = workers_kernel(
        functools.partial(_kernel, statics),
        "index_k_gradient",
        config,
        target,
        out_type=jax.ShapeDtypeStruct((items, block_size, width), jnp.float32),
        scratch=_scratch(config, block_size, width, index_q.dtype),
    )
    parts = kernel(gradients, index_q, order, tiles.tiles[:, ROW_TILE], starts)
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
    """What the kernel is compiled for: how many parts in all, and its shape."""

    items: int
    config: IndexKConfig


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
    num_arrays = len(_Refs._fields)
    inputs, smem = _Refs(*refs[:num_arrays]), _Scratch(*refs[num_arrays:])

    def role(run):
        return lambda worker: run(statics, inputs, smem, worker)

    run_workers(statics.config.num_workers, role(_consume), role(_produce))


def _for_each_part(statics: _Statics, refs: _Refs, worker, visit):
    """visit(item, first tile, one past its last, tiles before) for a worker's parts, in order.

    Returns how many tiles there were.
    """
    config = statics.config
    first, stride, num_items = items_of(config, worker, statics.items)

    def step(n, before):
        item = first + n * stride
        block, part = lax.div(item, config.num_parts), lax.rem(item, config.num_parts)
        start = refs.starts[block]
        count = refs.starts[block + 1] - start
        begin = start + lax.div(count * part, config.num_parts)
        end = start + lax.div(count * (part + 1), config.num_parts)
        visit(item, begin, end, before)
        return before + (end - begin)

    return lax.fori_loop(0, num_items, step, jnp.int32(0))


def _produce(statics: _Statics, refs: _Refs, smem: _Scratch, worker):
    """Keeps the worker's slots full."""
    slots = statics.config.num_slots

    def visit(item, begin, end, before):
        @pl.loop(begin, end)
        def _(n):
            number = before + n - begin
            slot = lax.rem(number, slots)
            wait_for_slot(smem.empty, worker, number, slots)
            tile = refs.order[n]
            full = smem.full.at[worker, slot]
            plgpu.copy_gmem_to_smem(refs.gradients.at[tile], smem.gradients.at[worker, slot], full)
            plgpu.copy_gmem_to_smem(
                refs.index_q.at[refs.row_tiles[tile]], smem.index_q.at[worker, slot], full
            )

    num_tiles = _for_each_part(statics, refs, worker, visit)
    drain(smem.empty, worker, num_tiles, slots)


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
