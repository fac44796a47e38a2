"""Attention of tiles of neighbouring queries over the union of their blocks, on a TPU.

Rows of the matrix products are (head, query) of a tile, so that which keys a query may see is one
mask of [R, keys] for all heads of its group.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import HIDDEN, LANES, LOG2E, Target, across, in_hbm, product
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring, tiles_in_turn
from pallas_kernels.sparse_attention.tile_lists import (
    BLOCK,
    MEMBERS,
    SCALARS,
    SLOT,
)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a kernel goes through tiles.

    Attributes:
      queries: per tile; a multiple of 8, the sublanes of a register.
      blocks_per_step: fetched at once.
      blocks_per_part: multiplied at once.
      depth: steps in flight, a power of two.
    """

    queries: int = 8
    blocks_per_step: int = 16
    blocks_per_part: int = 8
    depth: int = 4

    def __post_init__(self):
        if self.queries not in (8, 16, 24):
            raise ValueError(f"queries={self.queries}: must be 8, 16 or 24, a bit each in a word")
        if self.blocks_per_part < 1 or self.blocks_per_step % self.blocks_per_part:
            raise ValueError(
                f"blocks_per_step={self.blocks_per_step}: must be a multiple of "
                f"blocks_per_part={self.blocks_per_part}, which must be >= 1"
            )
        if self.depth < 2 or self.depth & (self.depth - 1):
            raise ValueError(f"depth={self.depth}: must be a power of two from 2 on")


def forward(
    q: Float[Array, "rows G T D"],
    k: Float[Array, "pages Bk D"],
    v: Float[Array, "pages Bk D"],
    lists: Int[Array, "tiles 4 L"],
    *,
    scale: float,
    config: TileConfig,
    target: Target,
) -> tuple[Float[Array, "rows G T D"], Float[Array, "rows G T"]]:
    """Output and log-sum-exp of each query.

    Args:
      q: per batch row and group the heads of all queries, T a multiple of a tile times the cores.
      k: blocks of keys of one head each.
      v: their values.
      lists: of the tiles of each row, see `tile_lists`.
      scale: of the scores, positive.
      config: tile sizes.
      target: what the kernel is traced for.
    """
    rows, group, num_queries, head_dim = q.shape
    tiles, num_rows = num_queries // config.queries, group * config.queries
    turn = tiles_in_turn(lists, target.chip.num_cores)

    def tile(core, i):
        number = turn.number(core, i)
        return number // tiles, number % tiles

    def of_queries(core, i):
        row, place = tile(core, i)
        return row, 0, place, 0

    queries = pl.BlockSpec((1, group, config.queries, head_dim), of_queries)
    stats = pl.BlockSpec((1, 1, 1, num_rows), lambda core, i: (*tile(core, i), 0, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    keys_per_step = config.blocks_per_step * k.shape[1]
    buffer = pltpu.VMEM((config.depth, keys_per_step, head_dim), k.dtype)
    o, lse = pl.pallas_call(
        functools.partial(_kernel, scale=scale, config=config),
        grid=turn.grid,
        in_specs=[*turn.lists, queries, hbm, hbm],
        out_specs=[queries, stats],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, tiles, 1, num_rows), jnp.float32),
        ],
        scratch_shapes=[
            buffer,
            buffer,
            pltpu.SemaphoreType.DMA((2, config.depth)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, head_dim), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=target.interpret,
        name="sparse_attention_forward",
    )(lists, lists, q, *in_hbm(k, v, target=target))
    lse = lse.reshape(rows, tiles, group, config.queries).swapaxes(1, 2)
    return o, lse.reshape(rows, group, num_queries)


def _kernel(
    now,
    after,
    q_ref,
    k_hbm,
    v_hbm,
    o_ref,
    lse_ref,
    keys,
    values,
    semaphores,
    state,
    *sums,
    scale,
    config,
):
    i = pl.program_id(1)
    has_next = i < pl.num_programs(1) - 1
    ring = Ring(now, after, has_next, (k_hbm, v_hbm), (keys, values), semaphores, state)
    softmax = _Softmax(*sums)
    pl.when(i == 0)(ring.reset)
    softmax.reset()
    _, group, queries, head_dim = q_ref.shape
    q = q_ref[0].reshape(group * queries, head_dim)

    def attend(step, slot, count):
        for first in range(0, count, config.blocks_per_part):
            taken = slot, ring.blocks(first, config.blocks_per_part)
            s = product(q, keys[taken], 1) * (scale * LOG2E)
            entry = step * config.blocks_per_step + first
            seen = visible(now, entry, config.blocks_per_part, queries, ring.block_size)
            s = jnp.where(seen, s.reshape(group, *seen.shape), HIDDEN).reshape(s.shape)
            softmax.add(s, values[taken])

    ring.run(config.blocks_per_part, attend)
    o, lse = softmax.results()
    o_ref[0] = o.astype(o_ref.dtype).reshape(o_ref.shape[1:])
    # Statistics lie along lanes in memory: one per row, it would be padded to 128.
    lse_ref[0, 0] = lse.T[:1]


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """The running softmax of a tile's rows.

    Attributes:
      top: largest score so far in units of log 2, the same in all lanes, [rows, lanes].
      total: sums of weights, each lane's own, [rows, lanes].
      acc: weighted values, [rows, D].
    """

    top: Any
    total: Any
    acc: Any

    def reset(self) -> None:
        self.top[...] = jnp.full(self.top.shape, HIDDEN, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.acc[...] = jnp.zeros(self.acc.shape, jnp.float32)

    def add(self, s: jax.Array, values: jax.Array) -> None:
        """Scores [rows, keys] and the keys' values."""
        before = self.top[...]
        highest = jnp.maximum(before, s.max(-1, keepdims=True))
        weights = jnp.exp2(s - across(highest, s.shape[1]))
        shrink = jnp.exp2(before - highest)
        lanes = [weights[:, i : i + LANES] for i in range(0, s.shape[1], LANES)]
        self.top[...] = highest
        self.total[...] = self.total[...] * shrink + sum(lanes)
        weighted = product(weights.astype(values.dtype), values, 0)
        self.acc[...] = self.acc[...] * across(shrink, weighted.shape[1]) + weighted

    def results(self) -> tuple[jax.Array, jax.Array]:
        """Output [rows, D], and the log-sum-exp in all lanes; 0 and -inf where nothing was seen."""
        highest = self.top[...]
        seen = highest > HIDDEN
        total = jnp.where(seen, self.total[...].sum(-1, keepdims=True), 1.0)
        width = self.acc.shape[1]
        o = jnp.where(across(seen, width), self.acc[...] / across(total, width), 0)
        return o, jnp.where(seen, (highest + jnp.log2(total)) / LOG2E, -jnp.inf)


def visible(tile, first, count, queries: int, block_size: int):
    """Which keys of a tile's blocks from the `first` on each query sees, [R, keys]."""
    query = jax.lax.broadcasted_iota(jnp.int32, (queries, block_size), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (queries, block_size), 1)
    # How far a key may be into a block for the query to see it.
    reach = tile[0, SCALARS, SLOT] + query - key
    parts = []
    for place in range(count):
        entry = jnp.minimum(first + place, tile.shape[2] - 1)
        members, block = tile[0, MEMBERS, entry], tile[0, BLOCK, entry]
        member = jnp.right_shift(members, query) & 1
        parts.append(jnp.where(member == 1, reach - block * block_size, -1))
    # Compared behind the join: half a register of booleans cannot be moved along the lanes.
    return jnp.concatenate(parts, axis=1) >= 0
