"""Attention of tiles of neighbouring queries over the union of their blocks, on a TPU.

Rows of the matrix products are (head, query) of a tile, so that which keys a query may see is one
mask of [R, keys] for all heads of its group.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import LANES, Target
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring
from pallas_kernels.sparse_attention.tile_lists import BLOCK, MEMBERS, NUM_ROWS, SCALARS, SLOT

# Scores of keys that a query does not see: finite, so that a difference of two is no NaN.
_HIDDEN = -1e30
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a kernel goes through tiles.

    Attributes:
      queries: per tile; a multiple of 8, the sublanes of a register.
      blocks_per_step: multiplied at once.
      depth: steps in flight, a power of two.
    """

    queries: int = 8
    blocks_per_step: int = 8
    depth: int = 4

    def __post_init__(self):
        if self.queries not in (8, 16, 24):
            raise ValueError(f"queries={self.queries}: must be 8, 16 or 24, a bit each in a word")
        if self.blocks_per_step < 1:
            raise ValueError(f"blocks_per_step={self.blocks_per_step}: must be >= 1")
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
    tiles = num_queries // config.queries
    cores = target.chip.num_cores
    per_core = rows * tiles // cores

    def tile(core, i):
        number = core * per_core + i
        return number // tiles, number % tiles

    def of_queries(core, i):
        row, place = tile(core, i)
        return row, 0, place, 0

    list_block = 1, NUM_ROWS, lists.shape[2]
    now = pl.BlockSpec(
        list_block, lambda core, i: (core * per_core + i, 0, 0), memory_space=pltpu.SMEM
    )
    after = pl.BlockSpec(
        list_block,
        lambda core, i: (core * per_core + jnp.minimum(i + 1, per_core - 1), 0, 0),
        memory_space=pltpu.SMEM,
    )
    queries = pl.BlockSpec((1, group, config.queries, head_dim), of_queries)
    stats = pl.BlockSpec((1, group, config.queries, 1), of_queries)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    keys_per_step = config.blocks_per_step * k.shape[1]
    buffer = pltpu.VMEM((config.depth, keys_per_step, head_dim), k.dtype)
    num_rows = group * config.queries
    o, lse = pl.pallas_call(
        functools.partial(_kernel, scale=scale, config=config),
        grid=(cores, per_core),
        in_specs=[now, after, queries, hbm, hbm],
        out_specs=[queries, stats],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        scratch_shapes=[
            buffer,
            buffer,
            pltpu.SemaphoreType.DMA((2, config.depth)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.VMEM((num_rows, head_dim), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
        ),
        interpret=target.interpret,
        name="sparse_attention_forward",
    )(lists, lists, q, k, v)
    return o, lse[..., 0]


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
    acc,
    top,
    total,
    *,
    scale,
    config,
):
    i = pl.program_id(1)
    ring = Ring(
        now,
        after,
        i < pl.num_programs(1) - 1,
        (k_hbm, v_hbm),
        (keys, values),
        semaphores,
        state,
        (1,),
    )
    pl.when(i == 0)(ring.reset)
    _, group, queries, head_dim = q_ref.shape
    q = q_ref[0].reshape(group * queries, head_dim)
    steps = ring.num_steps(now)
    top[...] = jnp.full(top.shape, _HIDDEN, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    ring.fill()

    def scores(step):
        return _product(q, keys[ring.slot(step)], 1) * (scale * _LOG2E)

    def body(step, s):
        ring.advance(step)
        # The products of the next step fill the time that this one's weights take; behind the last
        # one there is nothing to multiply, and its buffer belongs to the next tile.
        ring.wait(step + 1)
        following = scores(jnp.minimum(step + 1, steps - 1))
        seen = visible(now, step, config, keys.shape[1] // config.blocks_per_step)
        s = jnp.where(seen, s.reshape(group, queries, -1), _HIDDEN).reshape(s.shape)
        before = top[...]
        highest = jnp.maximum(before, s.max(-1, keepdims=True))
        p = jnp.exp2(s - across(highest, s.shape[1]))
        shrink = jnp.exp2(before - highest)
        top[...] = highest
        total[...] = total[...] * shrink + sum(
            p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)
        )
        product = _product(p.astype(values.dtype), values[ring.slot(step)], 0)
        acc[...] = acc[...] * across(shrink, head_dim) + product
        return following

    @pl.when(steps > 0)
    def _():
        ring.wait(0)
        jax.lax.fori_loop(0, steps, body, scores(0))

    ring.finish()
    highest = top[:, :1]
    seen = highest > _HIDDEN
    weight = jnp.where(seen, total[...].sum(-1, keepdims=True), 1.0)
    o_ref[0] = jnp.where(seen, acc[...] / weight, 0).astype(o_ref.dtype).reshape(o_ref.shape[1:])
    lse = jnp.where(seen, (highest + jnp.log2(weight)) / _LOG2E, -jnp.inf)
    lse_ref[0] = lse.reshape(lse_ref.shape[1:])


def visible(tile, step, config: TileConfig, block_size: int):
    """Which keys of a step each query of the tile sees, [R, keys]."""
    query = jax.lax.broadcasted_iota(jnp.int32, (config.queries, block_size), 0)
    key = jax.lax.broadcasted_iota(jnp.int32, (config.queries, block_size), 1)
    # How far a key may be into a block for the query to see it.
    reach = tile[0, SCALARS, SLOT] + query - key
    parts = []
    for place in range(config.blocks_per_step):
        entry = jnp.minimum(step * config.blocks_per_step + place, tile.shape[2] - 1)
        members, block = tile[0, MEMBERS, entry], tile[0, BLOCK, entry]
        member = jnp.right_shift(members, query) & 1
        parts.append((member == 1) & (reach >= block * block_size))
    return jnp.concatenate(parts, axis=1)


def _product(a, b, axis: int):
    """a times b over a's last axis and b's given one."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def across(rows, width: int):
    """One value per row, the same in every lane, over `width` of them."""
    return jnp.tile(rows, (1, -(-width // LANES)))[:, :width]
