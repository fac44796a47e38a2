"""Gradients of the KL in index queries and index keys, on a TPU.

Both recompute teacher and student: tiles go through their blocks for the index queries, blocks
through the tiles that need them for the index keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles_mosaic_tpu import (
    INDEX_LSE,
    STUDENT,
    TEACHER,
    IndexKLConfig,
    Scales,
    Tiles,
    first_slots,
    head_lse,
    over_tiles,
    pieces,
    teacher,
)
from pallas_kernels.mosaic_tpu import Target, in_hbm, product
from pallas_kernels.sparse_attention.reverse_tiles import DISTANCE, ReverseTiles
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring, slices_in_turn
from pallas_kernels.sparse_attention.tile_lists import MEMBERS, PAGE


def index_q_gradient(
    tiles: Tiles, scales: Scales, *, config: IndexKLConfig, target: Target
) -> Float[Array, "tiles R Di"]:
    """The gradient in the index queries, in float32.

    Args:
      tiles: the call, with all statistics.
      scales: of the scores.
      config: the kernel's shape.
      target: what the kernel is traced for.
    """
    index_dim = tiles.index_q.shape[2]
    (gradient,) = over_tiles(
        functools.partial(_index_q_gradient, scales, config),
        tiles,
        (tiles.keys, tiles.index_keys),
        results=(index_dim,),
        sums=(),
        config=config,
        target=target,
        name="index_kl_index_q_gradient",
    )
    return gradient


def _index_q_gradient(scales, config, q_ref, index_q_ref, statistics_ref, out_ref, _, ring):
    keys, index_keys = ring.buffers
    q, index_q = q_ref[0], index_q_ref[0].astype(index_keys.dtype)
    statistics = statistics_ref[0]
    lse = head_lse(statistics, scales.heads)
    start = first_slots(statistics, scales)
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    def compute(step, slot, count):
        gradients = []
        for at, seen in pieces(ring, config, step, count, start):
            t = teacher(q, keys[slot, at], lse, scales.main)
            s = product(index_q, index_keys[slot, at], 1) * scales.index
            gradients.append(_of_scores(t, s, statistics, seen))
        gradient = jnp.concatenate(gradients, axis=1).astype(index_keys.dtype)
        taken = index_keys[slot, ring.blocks(0, count)]
        out_ref[0] += product(gradient, taken, 0)

    ring.run(config.blocks_per_part, compute)


def _of_scores(t, s, statistics, seen):
    """Gradient of index scores: teacher (sum over heads) and scores [R, keys]."""
    student = jnp.exp2(s - statistics[:, INDEX_LSE : INDEX_LSE + 1])
    gradient = (
        statistics[:, STUDENT : STUDENT + 1] * student - statistics[:, TEACHER : TEACHER + 1] * t
    )
    return jnp.where(seen, gradient, 0)


class _Call(NamedTuple):
    """What the body of `index_k_gradient` knows of its call; blocks per batch row."""

    scales: Scales
    config: IndexKLConfig
    tiles_per_group: int
    num_blocks: int


def index_k_gradient(
    tiles: Tiles,
    slices: ReverseTiles,
    scales: Scales,
    *,
    batch: int,
    groups: int,
    config: IndexKLConfig,
    target: Target,
) -> Float[Array, "owners Bk Di"]:
    """The gradient in the index keys, in float32: that of all groups, block by block.

    Args:
      tiles: the call, with all statistics.
      slices: of each block of each batch row the tiles of all groups.
      scales: of the scores.
      batch: rows.
      groups: per batch row.
      config: the kernel's shape.
      target: what the kernel is traced for.
    """
    pages, block_size, head_dim = tiles.keys.shape
    index_dim = tiles.index_keys.shape[2]
    num_blocks = pages // (batch * groups)
    turn = slices_in_turn(slices)

    def owner(core, i, owners, first):
        return owners[turn.number(core, i, owners, first)]

    def of_owner(*step):
        row, block = jax.lax.div(owner(*step), num_blocks), jax.lax.rem(owner(*step), num_blocks)
        return row, 0, block, 0, 0

    sources = tiles.q, tiles.index_q, tiles.statistics
    call = _Call(scales, config, tiles.lists.shape[0] // (batch * groups), num_blocks)
    return pl.pallas_call(
        functools.partial(_index_k_gradient, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=turn.grid,
            in_specs=[
                *turn.lists,
                # One block of all groups' keys; index keys are the same for all.
                pl.BlockSpec((1, groups, 1, block_size, head_dim), of_owner),
                pl.BlockSpec((1, 1, 1, block_size, index_dim), of_owner),
                *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in sources),
            ],
            out_specs=pl.BlockSpec((1, block_size, index_dim), lambda *step: (owner(*step), 0, 0)),
            scratch_shapes=[
                *(
                    pltpu.VMEM(
                        (config.depth, config.tiles_per_step * x.shape[1], x.shape[2]), x.dtype
                    )
                    for x in sources
                ),
                pltpu.SemaphoreType.DMA((len(sources), config.depth)),
                pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch * num_blocks, block_size, index_dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=target.chip.vmem_bytes // 2,
        ),
        interpret=target.interpret,
        name="index_kl_index_k_gradient",
    )(
        slices.owners,
        slices.first_slices,
        slices.lists,
        slices.lists,
        tiles.keys.reshape(batch, groups, num_blocks, block_size, head_dim),
        tiles.index_keys.reshape(batch, groups, num_blocks, block_size, index_dim),
        *in_hbm(*sources, target=target),
    )


def _index_k_gradient(call, owners, first_slices, now, after, keys, index_keys, *refs):
    """One slice; those of an owner follow each other and add to the same block."""
    *sources, out_ref, q, index_q, statistics, semaphores, state = refs
    core, i = pl.program_id(0), pl.program_id(1)
    number, end = first_slices[core] + i, first_slices[core + 1]
    buffers = q, index_q, statistics
    ring = Ring(now, after, number + 1 < end, tuple(sources), buffers, semaphores, state)
    pl.when(i == 0)(ring.reset)

    @pl.when(number < end)
    def _():
        owner = owners[number]

        @pl.when((i == 0) | (owners[jnp.maximum(number - 1, 0)] != owner))
        def _():
            out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

        first_slot = jax.lax.rem(owner, call.num_blocks) * keys.shape[3]
        queries = call.config.queries

        def compute(step, slot, count):
            rows = pl.ds(0, count * queries)
            factor = index_q[slot, rows].astype(index_keys.dtype)
            block = index_keys[0, 0, 0]
            s = product(factor, block, 1) * call.scales.index
            # Of all tiles at once: lanes are broadcast in groups of the same lane.
            lse = head_lse(statistics[slot, rows], call.scales.heads)
            gradients = []
            for place in range(count):
                own = slice(place * queries, (place + 1) * queries)
                t = _teacher(call, ring, step, slot, place, keys, [x[own] for x in lse])
                seen = _seen(call, ring, step, place, t.shape, statistics[slot, own], first_slot)
                gradients.append(_of_scores(t, s[own], statistics[slot, own], seen))
            gradient = jnp.concatenate(gradients, axis=0).astype(factor.dtype)
            out_ref[0] += product(gradient.T, factor, 0)

        ring.run(call.config.tiles_per_part, compute)


def _teacher(call, ring, step, slot, place: int, keys, lse):
    """The teacher of a step's tile, summed over its heads, on the owner's keys: [R, Bk]."""
    page = ring.now[0, PAGE, step * call.config.tiles_per_step + place]
    group = jax.lax.rem(jax.lax.div(page, call.tiles_per_group), keys.shape[1])
    q = ring.buffers[0][slot, ring.blocks(place, 1)]
    return teacher(q, keys[0, group, 0], lse, call.scales.main)


def _seen(call, ring, step, place: int, shape, statistics, first_slot):
    """Which of the owner's keys each query of a step's tile sees, of `shape` [R, Bk]."""
    entry = step * call.config.tiles_per_step + place
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # A query that is d slots behind the block's first key sees it up to key d.
    seen = key <= ring.now[0, DISTANCE, entry] + query
    seen &= jnp.right_shift(ring.now[0, MEMBERS, entry], query) & 1 == 1
    if call.scales.starts:
        seen &= first_slot + key >= first_slots(statistics, call.scales)
    return seen
