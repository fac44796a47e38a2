"""KV-outer attention on Hopper: every key block against the queries that picked it.

A persistent thread block goes over slices of the reverse index. Its producer warpgroup copies the
slice's K and V blocks to shared memory and, tile by tile, gathers the heads of the queries that
picked the block: 64 rows of (query, head). Consumer warpgroups take the tiles in turn, so that
slices of uneven length leave none of them idle, and write each tile's softmax over this one block
and its log-sum-exp. `combine_mosaic_gpu` merges the K results of a query.
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
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import (
    MATRIX,
    ROWS,
    SHARED_MEMORY_BYTES,
    Target,
    by_rows,
    current_target,
    matmul,
    run_roles,
    swizzled,
)
from pallas_kernels.sparse_attention.reverse_index import ReverseIndex
from pallas_kernels.sparse_attention.slices_mosaic_gpu import Slice, for_each_slice
from pallas_kernels.sparse_attention.streaming_mosaic_gpu import copy_streaming

# Rows of a tile: what one warpgroup multiplies at a time.
TILE_ROWS = 64

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Shape of the attention kernel.

    Attributes:
      num_consumers: warpgroups that compute, 1 to 3.
      num_query_slots: tiles of queries in flight per consumer, 2 or more: a tile's slot is free
        again when the next tile is there.
      num_kv_stages: key blocks in flight.
      tiles_per_slice: at most so many tiles per visit of a key block.
      num_thread_blocks: that share the slices; one per core of the GPU.
    """

    num_consumers: int = 3
    num_query_slots: int = 2
    num_kv_stages: int = 2
    tiles_per_slice: int = 32
    num_thread_blocks: int = 132

    def __post_init__(self):
        if not 1 <= self.num_consumers <= 3:
            raise ValueError(
                f"num_consumers={self.num_consumers} must be 1 to 3: more would have too few "
                "registers"
            )
        if self.num_query_slots < 2:
            raise ValueError(f"num_query_slots={self.num_query_slots} must be at least 2")
        for field in ("num_kv_stages", "tiles_per_slice", "num_thread_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def shared_memory_bytes(self, head_dim: int, block_size: int) -> int:
        """Shared memory of a thread block for 16-bit inputs, without barriers."""
        tiles = self.num_consumers * self.num_query_slots * TILE_ROWS * head_dim * 2
        blocks = self.num_kv_stages * 2 * block_size * head_dim * 2
        return tiles + blocks + self.num_consumers * TILE_ROWS * 4

    def check(self, head_dim: int, block_size: int) -> None:
        """Raises ValueError if tiles and blocks do not fit into a core's shared memory."""
        needed = self.shared_memory_bytes(head_dim, block_size) + 1024
        if needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"num_consumers={self.num_consumers}, num_query_slots={self.num_query_slots} and "
                f"num_kv_stages={self.num_kv_stages} need {needed} bytes of shared memory, there "
                f"are {SHARED_MEMORY_BYTES}; lower one of them"
            )


def default_config(per_group: int) -> AttentionConfig:
    """The best shape for groups of so many heads: three consumers, unless they would spill."""
    if per_group == 8:
        return AttentionConfig(num_consumers=2, num_query_slots=3)
    return AttentionConfig()


def partial_attention(
    q: Float[Array, "queries Hq D"],
    k: Float[Array, "keys Hkv D"],
    v: Float[Array, "keys Hkv D"],
    index: ReverseIndex,
    *,
    block_size: int,
    scale: float,
    config: AttentionConfig,
) -> tuple[Float[Array, "places G D"], Float[Array, "places G"]]:
    """Attention of each place's query over the one block that the place belongs to.

    Args:
      q: all batch rows' queries, G = Hq / Hkv of 8, 16, 32 or 64.
      k: all batch rows' keys; a batch row has a whole number of blocks.
      v: values.
      index: of these queries and keys, with tiles of 64 / G queries.
      block_size: 64 or 128.
      scale: of the scores, positive.
      config: the kernel's shape.

    Returns:
      The softmax over the block in q's dtype and the base-2 log-sum-exp, by place. What no query
      picked is not written.
    """
    target = current_target()
    config.check(q.shape[-1], block_size)
    head_dim, per_group = q.shape[-1], q.shape[1] // k.shape[1]
    num_tiles = len(index.queries) * per_group // TILE_ROWS
    statics = _Statics(block_size, per_group, scale, config, target)
    o, lse = plgpu.kernel(
        functools.partial(_kernel, statics),
        out_type=(
            jax.ShapeDtypeStruct((num_tiles, TILE_ROWS, head_dim), q.dtype),
            jax.ShapeDtypeStruct((num_tiles, TILE_ROWS), jnp.float32),
        ),
        scratch_types=_scratch(config, per_group, head_dim, block_size, q.dtype, target),
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        # Rows are reduced within four lanes, which needs no scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name="partial_attention",
    )(q, k, v, index.queries, index.slices, index.num_slices)
    return o.reshape(-1, per_group, head_dim), lse.reshape(-1, per_group)


class _Statics(NamedTuple):
    """What the kernel is compiled for."""

    block_size: int
    per_group: int
    scale: float
    config: AttentionConfig
    target: Target


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    q: Any
    k: Any
    v: Any
    lse: Any
    q_full: Any
    q_empty: Any
    kv_full: Any
    kv_empty: Any
    probabilities: Any = None


def _scratch(
    config: AttentionConfig, per_group: int, head_dim: int, block_size: int, dtype, target: Target
) -> tuple:
    """What `_Scratch` refers to; only the interpreter has its last member."""
    consumers, slots, stages = config.num_consumers, config.num_query_slots, config.num_kv_stages
    transforms = swizzled(dtype)
    block = plgpu.SMEM((stages, block_size, head_dim), dtype, transforms=transforms)
    scratch = _Scratch(
        q=plgpu.SMEM((consumers, slots, TILE_ROWS, head_dim), dtype, transforms=transforms),
        k=block,
        v=block,
        lse=plgpu.SMEM((consumers, TILE_ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=TILE_ROWS // per_group, num_barriers=(consumers, slots)),
        q_empty=plgpu.Barrier(num_barriers=(consumers, slots)),
        kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        kv_empty=plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        probabilities=plgpu.SMEM((consumers, TILE_ROWS, block_size), dtype, transforms=transforms),
    )
    return tuple(scratch) if target.interpret is not None else tuple(scratch[:-1])


class _ThreadBlock(NamedTuple):
    """The references of a thread block, and what it is compiled for."""

    q: Any
    k: Any
    v: Any
    queries: Any
    slices: Any
    num_slices: Any
    o: Any
    lse: Any
    smem: _Scratch
    statics: _Statics

    def for_each_slice(self, visit):
        """visit(n, slice, tiles before it); returns how many slices and tiles there were."""
        return for_each_slice(
            self.slices, self.num_slices, self.statics.config.num_thread_blocks, visit
        )


def _kernel(statics: _Statics, q, k, v, queries, slices, num_slices, o, lse, *scratch):
    """Runs a consumer in each warpgroup but the last, which is the producer."""
    smem = _Scratch(*scratch)
    block = _ThreadBlock(q, k, v, queries, slices, num_slices, o, lse, smem, statics)
    run_roles(
        statics.config.num_consumers,
        functools.partial(_consume, block),
        functools.partial(_produce, block),
    )


def _produce(block: _ThreadBlock):
    """Keeps the rings of key blocks and of query tiles full."""
    smem, (block_size, per_group, _, config, _) = block.smem, block.statics
    stages, in_flight = config.num_kv_stages, config.num_consumers * config.num_query_slots

    def copy_keys_and_values(n, current):
        stage = lax.rem(n, stages)

        @pl.when(n >= stages)
        def _():
            plgpu.barrier_wait(smem.kv_empty.at[stage])

        rows = pl.ds(current.key_block * block_size, block_size)
        for source, copy in ((block.k, smem.k), (block.v, smem.v)):
            plgpu.copy_gmem_to_smem(
                source.at[rows, current.group], copy.at[stage], smem.kv_full.at[stage]
            )

    # Read ahead by few scalars, for the producer has few registers.
    batch = min(4, TILE_ROWS // per_group)
    batches = TILE_ROWS // per_group // batch

    def read_queries(number):
        return tuple(block.queries[number * batch + i] for i in range(batch))

    def visit(n, current, tiles_before):
        copy_keys_and_values(n, current)
        heads = pl.ds(current.group * per_group, per_group)
        first, num_batches = current.first_tile * batches, current.num_tiles * batches

        def gather(i, queries):
            upcoming = read_queries(first + jnp.minimum(i + 1, num_batches - 1))
            number, part = tiles_before + lax.div(i, batches), lax.rem(i, batches)
            consumer, slot = _ring(number, config)

            @pl.when((part == 0) & (number >= in_flight))
            def _():
                plgpu.barrier_wait(smem.q_empty.at[consumer, slot])

            for place, query in enumerate(queries):
                start = pl.multiple_of((part * batch + place) * per_group, per_group)
                plgpu.copy_gmem_to_smem(
                    block.q.at[query, heads],
                    smem.q.at[consumer, slot, pl.ds(start, per_group)],
                    smem.q_full.at[consumer, slot],
                )
            return upcoming

        lax.fori_loop(0, num_batches, gather, read_queries(first))

    num_slices, num_tiles = block.for_each_slice(visit)

    # The last releases are awaited too: a thread block ends when nothing uses its shared memory.
    @pl.loop(jnp.maximum(num_tiles - in_flight, 0), num_tiles)
    def _(number):
        plgpu.barrier_wait(smem.q_empty.at[_ring(number, config)])

    @pl.loop(jnp.maximum(num_slices - stages, 0), num_slices)
    def _(n):
        plgpu.barrier_wait(smem.kv_empty.at[lax.rem(n, stages)])


def _ring(number, config: AttentionConfig):
    """Whose turn a thread block's tile is, and in which slot of the consumer's ring it lies."""
    turn = lax.div(number, config.num_consumers)
    return lax.rem(number, config.num_consumers), lax.rem(turn, config.num_query_slots)


def _consume(block: _ThreadBlock, consumer):
    """Attends with every tile whose turn is this consumer's."""
    smem, config = block.smem, block.statics.config
    consumers = config.num_consumers

    def release(turn):
        """Hands a tile's slot back once its results have left shared memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(smem.q_empty.at[consumer, lax.rem(turn, config.num_query_slots)])

    def visit(n, current, tiles_before):
        stage = lax.rem(n, config.num_kv_stages)
        plgpu.barrier_wait(smem.kv_full.at[stage])
        first = lax.rem(consumer - lax.rem(tiles_before, consumers) + consumers, consumers)

        @pl.loop(first, current.num_tiles, step=consumers)
        def _(number):
            turn = lax.div(tiles_before + number, consumers)
            _attend(block, consumer, stage, turn, current, current.first_tile + number, release)

        plgpu.barrier_arrive(smem.kv_empty.at[stage])

    _, num_tiles = block.for_each_slice(visit)
    turns = lax.div(num_tiles - consumer + (consumers - 1), consumers)

    @pl.when(turns > 0)
    def _():
        release(turns - 1)

    plgpu.wait_smem_to_gmem(0)


def _attend(block: _ThreadBlock, consumer, stage, turn, current: Slice, tile, release):
    """One tile of queries against the slice's block: writes its output and log-sum-exp."""
    smem, (block_size, per_group, scale, config, _) = block.smem, block.statics
    slot = lax.rem(turn, config.num_query_slots)
    first_query = block.queries[tile * (TILE_ROWS // per_group)]
    plgpu.barrier_wait(smem.q_full.at[consumer, slot])
    q_tile = smem.q.at[consumer, slot]

    def score(accumulator):
        plgpu.wgmma(accumulator, q_tile, smem.k.at[stage].transpose((1, 0)))
        # Under the product, so that the slot's next queries are on their way a whole tile earlier.
        pl.when(turn > 0)(lambda: release(turn - 1))
        return accumulator[...]

    scores = pl.run_scoped(score, plgpu.ACC((TILE_ROWS, block_size), jnp.float32))
    # A list's queries ascend and none precedes the block: those inside it come first.
    scores = lax.cond(
        first_query < current.own_query + (block_size - 1),
        lambda: _causal(block, scores, current, tile),
        lambda: scores,
    )
    peak = scores.max(axis=1) * (scale * _LOG2_E)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp2(scores * (scale * _LOG2_E) - by_rows(shift, (TILE_ROWS, block_size)))
    total = weights.sum(axis=1)
    o = _weighted_values(block, consumer, stage, weights.astype(q_tile.dtype))
    # Where all scores are -inf the output is 0, as in the reference.
    o = o * by_rows(jnp.where(total == 0.0, 0.0, 1 / total), (TILE_ROWS, o.shape[1]))
    q_tile[...] = o.astype(q_tile.dtype)
    smem.lse[consumer] = shift + jnp.log2(total)
    plgpu.commit_smem()
    copy_streaming(q_tile, block.o, tile, block.statics.target)
    plgpu.copy_smem_to_gmem(smem.lse.at[consumer], block.lse.at[tile])


def _causal(block: _ThreadBlock, scores, current: Slice, tile):
    """-inf where the key comes after the query."""
    per_group = block.statics.per_group
    per_tile = TILE_ROWS // per_group
    place = plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS,), 0, layout=ROWS) // per_group
    last_key = plgpu.layout_cast(jnp.zeros((TILE_ROWS,), jnp.int32), ROWS)

    # A loop, for unrolled it would take registers that three consumers do not have.
    def set_last_key(i, last_key):
        seen = block.queries[tile * per_tile + i] - current.own_query
        return jnp.where(place == i, seen, last_key)

    last_key = lax.fori_loop(0, per_tile, set_last_key, last_key)
    keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MATRIX)
    return jnp.where(keys <= by_rows(last_key, scores.shape), scores, -jnp.inf)


def _weighted_values(block: _ThreadBlock, consumer, stage, weights):
    """weights @ V with the weights in registers; the interpreter takes them from shared memory."""
    smem = block.smem
    values = smem.v.at[stage]
    if block.statics.target.interpret is not None:
        smem.probabilities[consumer] = weights
        plgpu.commit_smem()
        weights = smem.probabilities.at[consumer]
    return matmul(weights, values, (TILE_ROWS, values.shape[1]))
