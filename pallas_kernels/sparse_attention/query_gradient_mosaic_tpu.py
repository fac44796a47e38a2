"""Gradient of sparse attention in the queries, on a TPU: tiles go through their blocks once more.

As in the forward pass, rows of the matrix products are (head, query) of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import LANES, LOG2E, Target, across, in_hbm, product
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig, visible
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring, tiles_in_turn

# Rows of a tile's statistics: the log-sum-exp of its scores in units of log2, finite; and what is
# taken off the gradient of each weight: sum(o * do) less the gradient of the log-sum-exp.
LSE, DELTA = range(2)
# As many as a vector register has sublanes, so that a copy of them is whole registers.
NUM_STATISTICS = 8


def query_gradient(
    q: Float[Array, "tiles rows D"],
    k: Float[Array, "pages Bk D"],
    v: Float[Array, "pages Bk D"],
    do: Float[Array, "tiles rows D"],
    statistics: Float[Array, "tiles 8 lanes"],
    lists: Int[Array, "tiles 4 L"],
    *,
    scale: float,
    config: TileConfig,
    target: Target,
) -> Float[Array, "tiles rows D"]:
    """The gradient in q, which is q's dtype.

    Args:
      q: of each tile the rows (head, query); the number of tiles is a multiple of the cores'.
      k: blocks of keys of one head each.
      v: their values.
      do: gradient of the output.
      statistics: of each row of a tile, at LSE and DELTA.
      lists: of `tile_lists`.
      scale: of the scores, positive.
      config: tile sizes.
      target: what the kernel is traced for.
    """
    _, num_rows, head_dim = q.shape
    turn = tiles_in_turn(lists, target.chip.num_cores)

    def this(core, i):
        return turn.number(core, i), 0, 0

    rows = pl.BlockSpec((1, num_rows, head_dim), this)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    keys_per_step = config.blocks_per_step * k.shape[1]
    buffer = pltpu.VMEM((config.depth, keys_per_step, head_dim), k.dtype)
    replicated = pltpu.VMEM((num_rows, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, config=config),
        grid=turn.grid,
        in_specs=[
            *turn.lists,
            rows,
            rows,
            pl.BlockSpec((1, *statistics.shape[1:]), this),
            hbm,
            hbm,
        ],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[
            buffer,
            buffer,
            pltpu.SemaphoreType.DMA((2, config.depth)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.VMEM((num_rows, head_dim), jnp.float32),
            replicated,
            replicated,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=target.chip.vmem_bytes // 2,
        ),
        interpret=target.interpret,
        name="sparse_attention_query_gradient",
    )(lists, lists, q, do, statistics, *in_hbm(k, v, target=target))


def _kernel(
    now,
    after,
    q_ref,
    do_ref,
    statistics,
    k_hbm,
    v_hbm,
    dq_ref,
    keys,
    values,
    semaphores,
    state,
    acc,
    lse,
    delta,
    *,
    scale,
    config,
):
    i = pl.program_id(1)
    has_next = i < pl.num_programs(1) - 1
    ring = Ring(now, after, has_next, (k_hbm, v_hbm), (keys, values), semaphores, state)
    pl.when(i == 0)(ring.reset)
    q, do = q_ref[0], do_ref[0]
    num_rows = q.shape[0]
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    columns = statistics[0].T
    for row, ref in ((LSE, lse), (DELTA, delta)):
        ref[...] = jnp.broadcast_to(columns[:num_rows, row : row + 1], ref.shape)

    def add(step, slot, count):
        for first in range(0, count, config.blocks_per_part):
            taken = slot, ring.blocks(first, config.blocks_per_part)
            s = product(q, keys[taken], 1) * (scale * LOG2E)
            weights = jnp.exp2(s - across(lse[...], s.shape[1]))
            ds = weights * (product(do, values[taken], 1) - across(delta[...], s.shape[1]))
            entry = step * config.blocks_per_step + first
            seen = visible(now, entry, config.blocks_per_part, config.queries, ring.block_size)
            ds = jnp.where(seen, ds.reshape(-1, *seen.shape), 0).reshape(s.shape)
            acc[...] += product(ds.astype(keys.dtype), keys[taken], 0)

    ring.run(config.blocks_per_part, add)
    dq_ref[0] = (acc[...] * scale).astype(dq_ref.dtype)
