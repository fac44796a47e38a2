"""Merges the partial results of KV-outer attention on Hopper.

A slot's weight is exp(its log-sum-exp - that of all slots); the output is the weighted sum. Bound
by the bandwidth that reads the partial results once: the producer warpgroup gathers them, one copy
per query and slot, into a ring per consumer; a consumer adds up a tile of 64 rows (query, head) in
registers.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    MATRIX,
    ROWS,
    SHARED_MEMORY_BYTES,
    by_rows,
    current_target,
    full_rows,
    run_roles,
    swizzled,
)

TILE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Shape of the combine kernel.

    Attributes:
      num_consumers: warpgroups that add up, 1 or 2.
      num_slots: tiles of partial results in flight per consumer.
      num_thread_blocks: that share the tiles; a multiple of the GPU's cores.
    """

    num_consumers: int = 2
    num_slots: int = 5
    num_thread_blocks: int = 132

    def __post_init__(self):
        if self.num_consumers not in (1, 2):
            raise ValueError(
                f"num_consumers={self.num_consumers} must be 1 or 2: more would have too few "
                "registers"
            )
        for field in ("num_slots", "num_thread_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def fitted(self, head_dim: int, top_k: int) -> "CombineConfig":
        """This shape with as many slots as shared memory has room for beside the log-sum-exps.

        Raises:
          ValueError: not even two fit.
        """
        tile = TILE_ROWS * head_dim * 2
        rows = -(-(2 * top_k + 1) * TILE_ROWS * 4 // 1024) * 1024
        room = (SHARED_MEMORY_BYTES - 1024) // self.num_consumers - tile - rows
        slots = min(self.num_slots, room // tile)
        if slots < 2:
            raise ValueError(
                f"num_consumers={self.num_consumers} leaves no room for two tiles of head_dim="
                f"{head_dim} beside the log-sum-exps of top_k={top_k}; lower num_consumers"
            )
        return dataclasses.replace(self, num_slots=slots)


def combine(
    partial: Float[Array, "places G D"],
    places: Int[Array, "B Hkv tiles K R"],
    partial_lse: Float[Array, "B Hkv tiles K R*G"],
    o: jax.Ref,
    first_query: Int[Array, ""],
    first_group: Int[Array, ""] | int = 0,
    *,
    config: CombineConfig,
    normalized: bool = True,
) -> Float[Array, "B Hkv tiles R*G"]:
    """Writes every query's merged results into `o` and returns its natural log-sum-exp.

    Args:
      partial: results by place; what no slot refers to may hold anything.
      places: of each query's slots, for tiles of R = 64 / G queries; any place where the slot's
        log-sum-exp is -inf.
      partial_lse: float32, base 2, per slot and (query, head).
      o: [B * T, heads, D] in `partial`'s dtype, the batch rows one after the other, T at least
        first_query + tiles * R; the sums are taken in float32. Rows of other queries and groups
        stay as they are, so that chunks fill it without a copy.
      first_query: of the tiles, within each batch row of `o`.
      first_group: of the tiles, in `o`.
      config: the kernel's shape.
      normalized: whether weights are shares of their sum. If not they are exp2(log-sum-exp), so
        that slots with 0 are simply added up, and 0 is returned.
    """
    target = current_target()
    batch, groups, num_tiles, top_k, per_tile = places.shape
    _, per_group, head_dim = partial.shape
    config = config.fitted(head_dim, top_k)
    sizes = _Sizes(
        batch * groups * num_tiles,
        num_tiles,
        groups,
        top_k,
        per_tile,
        per_group,
        o.shape[0] // batch,
        normalized,
    )
    lse = plgpu.kernel(
        functools.partial(_kernel, sizes, config),
        out_type=jax.ShapeDtypeStruct((sizes.total, TILE_ROWS), jnp.float32),
        scratch_types=_scratch(config, sizes, head_dim, partial.dtype),
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=target.interpret,
        kernel_name="combine",
    )(
        partial,
        places.reshape(sizes.total, top_k * per_tile),
        partial_lse.reshape(sizes.total, top_k, TILE_ROWS),
        o,
        jnp.stack([first_query, jnp.asarray(first_group, jnp.int32)]),
    )
    return lse.reshape(batch, groups, num_tiles, TILE_ROWS)


class _Sizes(NamedTuple):
    """Tiles in all and per (batch row, group), groups, slots, queries per tile, heads per group,
    queries of a batch row of the output; and whether weights are shares of their sum.
    """

    total: int
    num_tiles: int
    groups: int
    top_k: int
    per_tile: int
    per_group: int
    num_queries: int
    normalized: bool


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    partial: Any
    partial_lse: Any
    o: Any
    lse: Any
    partial_full: Any
    partial_empty: Any
    lse_full: Any
    lse_empty: Any


class _ThreadBlock(NamedTuple):
    """The references of a thread block, and what it is compiled for."""

    partial: Any
    places: Any
    partial_lse: Any
    o: Any
    first: Any
    lse: Any
    smem: _Scratch
    sizes: _Sizes
    config: CombineConfig


def _scratch(config: CombineConfig, sizes: _Sizes, head_dim: int, dtype) -> tuple:
    consumers, slots = config.num_consumers, config.num_slots
    transforms = swizzled(dtype)
    return tuple(
        _Scratch(
            partial=plgpu.SMEM(
                (consumers, slots, TILE_ROWS, head_dim), dtype, transforms=transforms
            ),
            partial_lse=plgpu.SMEM((consumers, 2, sizes.top_k, TILE_ROWS), jnp.float32),
            o=plgpu.SMEM((consumers, TILE_ROWS, head_dim), dtype, transforms=transforms),
            lse=plgpu.SMEM((consumers, TILE_ROWS), jnp.float32),
            partial_full=plgpu.Barrier(
                num_arrivals=sizes.per_tile, num_barriers=(consumers, slots)
            ),
            partial_empty=plgpu.Barrier(num_barriers=(consumers, slots)),
            lse_full=plgpu.Barrier(num_barriers=(consumers, 2)),
            lse_empty=plgpu.Barrier(num_barriers=(consumers, 2)),
        )
    )


def _kernel(
    sizes: _Sizes,
    config: CombineConfig,
    partial,
    places,
    partial_lse,
    o,
    first,
    lse,
    *scratch,
):
    """Runs a consumer in each warpgroup but the last, which is the producer."""
    smem = _Scratch(*scratch)
    block = _ThreadBlock(partial, places, partial_lse, o, first, lse, smem, sizes, config)
    run_roles(
        config.num_consumers,
        functools.partial(_consume, block),
        functools.partial(_produce, block),
    )


def _num_turns(block: _ThreadBlock, consumer):
    """How many tiles a consumer has."""
    first = lax.axis_index("thread_block") * block.config.num_consumers + consumer
    stride = block.config.num_thread_blocks * block.config.num_consumers
    return lax.div(block.sizes.total - first + (stride - 1), stride)


def _tile(block: _ThreadBlock, consumer, turn):
    """The number of a consumer's tile."""
    thread_block = lax.axis_index("thread_block") + turn * block.config.num_thread_blocks
    return thread_block * block.config.num_consumers + consumer


def _produce(block: _ThreadBlock):
    """Keeps the consumers' rings full, a slot of each in turn."""
    smem, sizes, config = block.smem, block.sizes, block.config
    consumers = range(config.num_consumers)
    num_turns = [_num_turns(block, consumer) for consumer in consumers]

    def copy_partial_lse(turn, consumer, tile):
        stage = lax.rem(turn, 2)

        @pl.when(turn >= 2)
        def _():
            plgpu.barrier_wait(smem.lse_empty.at[consumer, stage])

        plgpu.copy_gmem_to_smem(
            block.partial_lse.at[tile],
            smem.partial_lse.at[consumer, stage],
            smem.lse_full.at[consumer, stage],
        )

    # Read ahead by few scalars, for the producer has few registers.
    batch = min(4, sizes.per_tile)
    batches = sizes.per_tile // batch
    last = sizes.top_k * batches - 1

    def read_places(tile, number):
        return tuple(block.places[tile, number * batch + i] for i in range(batch))

    def gather(turn, i, consumer, places):
        step, part = turn * sizes.top_k + lax.div(i, batches), lax.rem(i, batches)
        slot = lax.rem(step, config.num_slots)

        @pl.when((part == 0) & (step >= config.num_slots))
        def _():
            plgpu.barrier_wait(smem.partial_empty.at[consumer, slot])

        for number, place in enumerate(places):
            start = pl.multiple_of((part * batch + number) * sizes.per_group, sizes.per_group)
            plgpu.copy_gmem_to_smem(
                block.partial.at[place],
                smem.partial.at[consumer, slot, pl.ds(start, sizes.per_group)],
                smem.partial_full.at[consumer, slot],
            )

    # The consumers' numbers of tiles differ by one at most, the first has the most.
    @pl.loop(0, num_turns[0])
    def _(turn):
        tiles = [
            jnp.minimum(_tile(block, consumer, turn), sizes.total - 1) for consumer in consumers
        ]
        for consumer in consumers:
            pl.when(turn < num_turns[consumer])(
                functools.partial(copy_partial_lse, turn, consumer, tiles[consumer])
            )

        def step(i, places):
            upcoming = [read_places(tile, jnp.minimum(i + 1, last)) for tile in tiles]
            for consumer in consumers:
                pl.when(turn < num_turns[consumer])(
                    functools.partial(gather, turn, i, consumer, places[consumer])
                )
            return upcoming

        lax.fori_loop(0, last + 1, step, [read_places(tile, 0) for tile in tiles])

    for consumer in consumers:
        _await_releases(block, consumer, num_turns[consumer])


def _await_releases(block: _ThreadBlock, consumer, num_turns):
    """Waits for the releases that no copy waited for."""
    smem, config = block.smem, block.config
    num_steps = num_turns * block.sizes.top_k

    @pl.loop(jnp.maximum(num_steps - config.num_slots, 0), num_steps)
    def _(step):
        plgpu.barrier_wait(smem.partial_empty.at[consumer, lax.rem(step, config.num_slots)])

    @pl.loop(jnp.maximum(num_turns - 2, 0), num_turns)
    def _(turn):
        plgpu.barrier_wait(smem.lse_empty.at[consumer, lax.rem(turn, 2)])


def _consume(block: _ThreadBlock, consumer):
    """Adds up this consumer's tiles and writes them."""
    smem, sizes, config = block.smem, block.sizes, block.config
    shape = smem.o.shape[1:]

    @pl.loop(0, _num_turns(block, consumer))
    def _(turn):
        stage = lax.rem(turn, 2)
        plgpu.barrier_wait(smem.lse_full.at[consumer, stage])
        slots = smem.partial_lse.at[consumer, stage]
        lse = _log_sum_exp(slots, sizes.top_k) if sizes.normalized else full_rows(TILE_ROWS, 0.0)
        shift = jnp.where(lse == -jnp.inf, 0.0, lse)

        def add(k, total):
            slot = lax.rem(turn * sizes.top_k + k, config.num_slots)
            weights = jnp.exp2(plgpu.load(slots.at[k], layout=ROWS) - shift)
            weights = by_rows(weights, shape)
            plgpu.barrier_wait(smem.partial_full.at[consumer, slot])
            partial = plgpu.load(smem.partial.at[consumer, slot], layout=MATRIX)
            # Copies and loads are ordered by this fence alone.
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.partial_empty.at[consumer, slot])
            # Nothing leaks from where nobody wrote: that has weight 0.
            weighted = weights * partial.astype(jnp.float32)
            return total + jnp.where(weights == 0.0, 0.0, weighted)

        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
        total = lax.fori_loop(0, sizes.top_k, add, zeros)
        plgpu.barrier_arrive(smem.lse_empty.at[consumer, stage])
        _store(block, consumer, _tile(block, consumer, turn), total, lse * math.log(2))

    plgpu.wait_smem_to_gmem(0)


def _log_sum_exp(slots, top_k: int) -> jax.Array:
    """Over the slots, base 2: of [top_k, rows] in shared memory; -inf where all of them are."""

    def row(k):
        return plgpu.load(slots.at[k], layout=ROWS)

    peak = lax.fori_loop(1, top_k, lambda k, peak: jnp.maximum(peak, row(k)), row(0))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = lax.fori_loop(
        1, top_k, lambda k, total: total + jnp.exp2(row(k) - peak), jnp.exp2(row(0) - peak)
    )
    return peak + jnp.log2(total)


def _store(block: _ThreadBlock, consumer, tile, total, lse):
    """Writes a tile's rows to their queries and heads, and their log-sum-exp."""
    smem, sizes = block.smem, block.sizes
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.o[consumer] = total.astype(smem.o.dtype)
    smem.lse[consumer] = lse
    plgpu.commit_smem()
    row, column = lax.div(tile, sizes.num_tiles), lax.rem(tile, sizes.num_tiles)
    batch_row, group = lax.div(row, sizes.groups), lax.rem(row, sizes.groups)
    first_query = batch_row * sizes.num_queries + block.first[0] + column * sizes.per_tile
    heads = pl.ds((block.first[1] + group) * sizes.per_group, sizes.per_group)
    for i in range(sizes.per_tile):
        rows = pl.ds(i * sizes.per_group, sizes.per_group)
        plgpu.copy_smem_to_gmem(
            smem.o.at[consumer, rows], block.o.at[first_query + i, heads], commit_group=False
        )
    plgpu.copy_smem_to_gmem(smem.lse.at[consumer], block.lse.at[tile], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
