"""Gradients of sparse attention in keys and values, on a TPU: blocks go through their tiles.

The matrix products are transposed, keys by rows of tiles (head, query), so that what belongs to a
row lies along lanes and nothing needs transposing: a group's heads are summed in the products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic_tpu import LOG2E, Target, in_hbm, product
from pallas_kernels.sparse_attention.query_gradient_mosaic_tpu import (
    DELTA,
    LSE,
    NUM_STATISTICS,
)
from pallas_kernels.sparse_attention.reverse_tiles import DISTANCE, ReverseTiles
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring, slices_in_turn
from pallas_kernels.sparse_attention.tile_lists import MEMBERS


def key_value_gradient(
    q: Float[Array, "tiles rows D"],
    k: Float[Array, "pages Bk D"],
    v: Float[Array, "pages Bk D"],
    do: Float[Array, "tiles rows D"],
    statistics: Float[Array, "tiles 8 lanes"],
    slices: ReverseTiles,
    *,
    scale: float,
    queries: int,
    tiles_per_step: int,
    tiles_per_part: int,
    depth: int,
    target: Target,
) -> tuple[Float[Array, "pages Bk D"], Float[Array, "pages Bk D"]]:
    """The gradients in k and v, of their dtype; zeros for blocks that nobody picked.

    Args:
      q: of each tile the rows (head, query).
      k: blocks of keys of one head each.
      v: their values.
      do: gradient of the output.
      statistics: of each row of a tile, see `query_gradient`.
      slices: the tiles of each page, for as many cores as it has.
      scale: of the scores, positive.
      queries: R, per tile.
      tiles_per_step: fetched at once.
      tiles_per_part: multiplied at once; a divisor.
      depth: steps in flight, a power of two.
      target: what the kernel is traced for.
    """
    _, num_rows, head_dim = q.shape
    block_size = k.shape[1]
    turn = slices_in_turn(slices)

    def of_owner(core, i, owners, first):
        return owners[turn.number(core, i, owners, first)], 0, 0

    page = pl.BlockSpec((1, block_size, head_dim), of_owner)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    rows = pltpu.VMEM((depth, tiles_per_step * num_rows, head_dim), q.dtype)
    sums = pltpu.VMEM((block_size, head_dim), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, queries=queries, tiles_per_part=tiles_per_part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=turn.grid,
            in_specs=[
                *turn.lists,
                page,
                page,
                hbm,
                hbm,
                hbm,
            ],
            out_specs=[page, page],
            scratch_shapes=[
                rows,
                rows,
                pltpu.VMEM(
                    (depth, tiles_per_step * NUM_STATISTICS, statistics.shape[2]), jnp.float32
                ),
                pltpu.SemaphoreType.DMA((3, depth)),
                pltpu.SMEM((2,), jnp.int32),
                sums,
                sums,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=target.chip.vmem_bytes // 2,
        ),
        interpret=target.interpret,
        name="sparse_attention_key_value_gradient",
    )(
        slices.owners,
        slices.first_slices,
        slices.lists,
        slices.lists,
        k,
        v,
        *in_hbm(q, do, statistics, target=target),
    )


def _kernel(
    owners,
    first_slices,
    now,
    after,
    k_ref,
    v_ref,
    q_hbm,
    do_hbm,
    statistics_hbm,
    dk_ref,
    dv_ref,
    queries_ref,
    do_ref,
    statistics,
    semaphores,
    state,
    dk,
    dv,
    *,
    scale,
    queries,
    tiles_per_part,
):
    core, i = pl.program_id(0), pl.program_id(1)
    number, end = first_slices[core] + i, first_slices[core + 1]
    buffers = queries_ref, do_ref, statistics
    sources = q_hbm, do_hbm, statistics_hbm
    ring = Ring(now, after, number + 1 < end, sources, buffers, semaphores, state)
    pl.when(i == 0)(ring.reset)

    @pl.when(number < end)
    def _():
        owner = owners[number]
        first = (i == 0) | (owners[jnp.maximum(number - 1, 0)] != owner)
        last = (number + 1 == end) | (owners[jnp.minimum(number + 1, end - 1)] != owner)

        @pl.when(first)
        def _():
            dk[...] = jnp.zeros(dk.shape, jnp.float32)
            dv[...] = jnp.zeros(dv.shape, jnp.float32)

        add = functools.partial(
            _add, ring, k_ref[0], v_ref[0], dk, dv, scale=scale, queries=queries
        )

        def add_parts(step, slot, count):
            for place in range(0, count, tiles_per_part):
                add(step, slot, place, tiles_per_part)

        ring.run(tiles_per_part, add_parts)

        @pl.when(last)
        def _():
            dk_ref[0] = (dk[...] * scale).astype(dk_ref.dtype)
            dv_ref[0] = dv[...].astype(dv_ref.dtype)


def _add(ring, k, v, dk, dv, step, slot, first, count, *, scale, queries):
    """Adds the terms of `count` tiles of a step, from the `first` on."""
    q_buffer, do_buffer, statistics = ring.buffers
    taken = ring.blocks(first, count)
    num_rows = ring.block_size
    q, do = q_buffer[slot, taken], do_buffer[slot, taken]

    def along_lanes(which):
        rows = [(first + place) * NUM_STATISTICS + which for place in range(count)]
        parts = [statistics[slot, pl.ds(row, 1), pl.ds(0, num_rows)] for row in rows]
        return jnp.concatenate(parts, axis=1)

    s = product(k, q, 1) * (scale * LOG2E)
    entry = step * ring.blocks_per_step + first
    reach = _reach(ring, entry, count, queries)
    seen = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) <= reach
    weights = jnp.where(seen, jnp.exp2(s - along_lanes(LSE)), 0)
    dv[...] += product(weights.astype(v.dtype), do, 0)
    ds = weights * (product(v, do, 1) - along_lanes(DELTA))
    dk[...] += product(ds.astype(k.dtype), q, 0)


def _reach(ring, entry, count: int, queries: int):
    """The last key of the block that each row of some tiles sees, [1, rows]; below 0: none."""
    tiles, num_rows = ring.now, ring.block_size
    row = jax.lax.broadcasted_iota(jnp.int32, (1, count * num_rows), 1)
    query = jax.lax.rem(row, queries)
    distance = members = jnp.zeros(row.shape, jnp.int32)
    for place in range(count):
        at = jnp.minimum(entry + place, tiles.shape[2] - 1)
        mine = row >= place * num_rows
        there = entry + place < ring.count
        members = jnp.where(mine, jnp.where(there, tiles[0, MEMBERS, at], 0), members)
        distance = jnp.where(mine, tiles[0, DISTANCE, at], distance)
    member = jnp.right_shift(members, query) & 1
    return jnp.where(member == 1, distance + query, -1)
