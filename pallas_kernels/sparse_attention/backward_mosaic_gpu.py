"""The gradients of KV-outer attention on Hopper: key blocks against the queries that picked them.

A persistent thread block goes over slices of the reverse index. K and V of the slice's block stay
in shared memory; its producer warpgroup gathers, tile by tile, 64 rows (query, head) of Q and dO.
Each consumer warpgroup owns 64 of the block's keys, so that scores lie with keys along rows and
queries along columns:

    P  = exp2(K Qᵀ - lse)        dS = P * (V dOᵀ - delta)        dV += P dO        dK += dS Q

dK and dV stay in registers for a whole slice. A tile's dQ = dSᵀ K needs all keys of the block: dS
meets in shared memory, and the consumers take turns to multiply it. Each query has one such partial
result per block that it picked; they are added up afterwards, in the order of its slots.
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
    SHARED_MEMORY_BYTES,
    Target,
    current_target,
    matmul,
    run_roles,
    swizzled,
)
from pallas_kernels.sparse_attention.adding_mosaic_gpu import add_to
from pallas_kernels.sparse_attention.opaque_mosaic_gpu import opaque
from pallas_kernels.sparse_attention.reverse_index import ReverseIndex, max_split_slices
from pallas_kernels.sparse_attention.slices_mosaic_gpu import Slice, for_each_slice
from pallas_kernels.sparse_attention.streaming_mosaic_gpu import copy_streaming

# Rows of a tile of queries, and keys of a consumer: what one warpgroup multiplies at a time.
TILE_ROWS = 64
CONSUMER_KEYS = 64

# One value per column of a matrix product.
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """Shape of the gradient kernel.

    Attributes:
      num_query_slots: tiles of queries in flight, 2 or more.
      tiles_per_slice: at most so many tiles per visit of a key block.
      num_thread_blocks: that share the slices; one per core of the GPU.
    """

    num_query_slots: int = 3
    tiles_per_slice: int = 64
    num_thread_blocks: int = 132

    def __post_init__(self):
        if self.num_query_slots < 2:
            raise ValueError(f"num_query_slots={self.num_query_slots} must be at least 2")
        for field in ("tiles_per_slice", "num_thread_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def shared_memory_bytes(self, head_dim: int, block_size: int) -> int:
        """Shared memory of a thread block for 16-bit inputs, without barriers."""
        consumers = block_size // CONSUMER_KEYS
        block = 2 * block_size * head_dim * 2
        tiles = self.num_query_slots * TILE_ROWS * (2 * head_dim * 2 + 2 * 4)
        return block + tiles + consumers * TILE_ROWS * (block_size + head_dim) * 2

    def check(self, head_dim: int, block_size: int) -> None:
        """Raises ValueError if tiles and blocks do not fit into a core's shared memory."""
        needed = self.shared_memory_bytes(head_dim, block_size) + 512
        if needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"num_query_slots={self.num_query_slots} needs {needed} bytes of shared memory, "
                f"there are {SHARED_MEMORY_BYTES}; lower it"
            )


def block_gradients(
    q: Float[Array, "queries Hq D"],
    do: Float[Array, "queries Hq D"],
    k: Float[Array, "keys Hkv D"],
    v: Float[Array, "keys Hkv D"],
    statistics: Float[Array, "tiles 2 rows"],
    index: ReverseIndex,
    dk: jax.Ref,
    dv: jax.Ref,
    *,
    block_size: int,
    scale: float,
    config: GradientConfig,
) -> tuple[Float[Array, "places G D"], Float[Array, "slots 2 Bk D"]]:
    """Adds the gradients of keys and values to `dk` and `dv`; returns those of queries in parts.

    Args:
      q: all batch rows' queries, G = Hq / Hkv of 8, 16, 32 or 64.
      do: the output's cotangent.
      k: all batch rows' keys; a batch row has a whole number of blocks.
      v: values.
      statistics: per tile and row (query, head) the log-sum-exp of its scaled scores, base 2, and
        what is taken from dP. Where nobody is, an infinite log-sum-exp makes all gradients 0.
      index: of these queries and keys, with tiles of 64 / G queries and at most one row per batch
        row and group.
      dk: [keys, Hkv, D] float32; dK / scale is added.
      dv: [keys, Hkv, D] float32; dV is added.
      block_size: 64 or 128.
      scale: of the scores, positive.
      config: the kernel's shape.

    Returns:
      By place dQ of the place's block, in q's dtype; what no query picked is not written. And dK /
      scale and dV of lists that have several slices, by `SLOT`: they are not in `dk` and `dv` yet.
    """
    target = current_target()
    head_dim, per_group = q.shape[-1], q.shape[1] // k.shape[1]
    config.check(head_dim, block_size)
    num_tiles = len(index.queries) * per_group // TILE_ROWS
    num_slots = max_split_slices(num_tiles, config.tiles_per_slice)
    statics = _Statics(block_size, per_group, head_dim, scale, config, target)
    dq, parts = plgpu.kernel(
        functools.partial(_kernel, statics),
        out_type=(
            jax.ShapeDtypeStruct((num_tiles, TILE_ROWS, head_dim), q.dtype),
            jax.ShapeDtypeStruct((num_slots, 2, block_size, head_dim), jnp.float32),
        ),
        scratch_types=_scratch(statics, q.dtype),
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=statics.num_consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name="block_gradients",
    )(q, do, k, v, statistics, index.queries, index.slices, index.num_slices, dk, dv)
    return dq.reshape(-1, per_group, head_dim), parts


class _Statics(NamedTuple):
    """What the kernel is compiled for."""

    block_size: int
    per_group: int
    head_dim: int
    scale: float
    config: GradientConfig
    target: Target

    @property
    def num_consumers(self) -> int:
        return self.block_size // CONSUMER_KEYS


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block."""

    k: Any
    v: Any
    q: Any
    do: Any
    statistics: Any
    ds: Any
    dq: Any
    kv_full: Any
    kv_empty: Any
    q_full: Any
    q_empty: Any
    ds_full: Any
    probabilities: Any = None


def _scratch(statics: _Statics, dtype) -> tuple:
    """What `_Scratch` refers to; only the interpreter has its last member."""
    consumers, slots = statics.num_consumers, statics.config.num_query_slots
    block_size, head_dim = statics.block_size, statics.head_dim

    def operand(*shape):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    scratch = _Scratch(
        k=operand(1, block_size, head_dim),
        v=operand(1, block_size, head_dim),
        q=operand(slots, TILE_ROWS, head_dim),
        do=operand(slots, TILE_ROWS, head_dim),
        statistics=plgpu.SMEM((slots, 2, TILE_ROWS), jnp.float32),
        ds=operand(consumers, block_size, TILE_ROWS),
        dq=operand(consumers, TILE_ROWS, head_dim),
        kv_full=plgpu.Barrier(num_arrivals=2),
        kv_empty=plgpu.Barrier(num_arrivals=consumers),
        q_full=plgpu.Barrier(
            num_arrivals=2 * TILE_ROWS // statics.per_group + 1, num_barriers=slots
        ),
        q_empty=plgpu.Barrier(num_arrivals=consumers, num_barriers=slots),
        ds_full=plgpu.Barrier(num_arrivals=consumers, num_barriers=consumers),
        probabilities=operand(consumers, CONSUMER_KEYS, TILE_ROWS),
    )
    return tuple(scratch) if statics.target.interpret is not None else tuple(scratch[:-1])


class _ThreadBlock(NamedTuple):
    """The references of a thread block, and what it is compiled for."""

    q: Any
    do: Any
    k: Any
    v: Any
    statistics: Any
    queries: Any
    slices: Any
    num_slices: Any
    dk: Any
    dv: Any
    dq: Any
    parts: Any
    smem: _Scratch
    statics: _Statics

    def for_each_slice(self, visit):
        """visit(n, slice, tiles before it); returns how many slices and tiles there were."""
        return for_each_slice(
            self.slices, self.num_slices, self.statics.config.num_thread_blocks, visit
        )


def _kernel(statics: _Statics, *refs):
    """Runs a consumer in each warpgroup but the last, which is the producer."""
    arrays = len(_ThreadBlock._fields) - 2
    block = _ThreadBlock(*refs[:arrays], smem=_Scratch(*refs[arrays:]), statics=statics)
    run_roles(
        statics.num_consumers,
        functools.partial(_consume, block),
        functools.partial(_produce, block),
    )


def _produce(block: _ThreadBlock):
    """Loads each slice's key block and keeps the ring of query tiles full."""
    smem, statics = block.smem, block.statics
    per_group, slots = statics.per_group, statics.config.num_query_slots
    # Read ahead by few scalars, for the producer has few registers.
    batch = min(4, TILE_ROWS // per_group)
    batches = TILE_ROWS // per_group // batch

    def copy_keys_and_values(n, current):
        pl.when(n > 0)(lambda: plgpu.barrier_wait(smem.kv_empty))
        rows = pl.ds(current.key_block * statics.block_size, statics.block_size)
        for source, copy in ((block.k, smem.k), (block.v, smem.v)):
            plgpu.copy_gmem_to_smem(source.at[rows, current.group], copy.at[0], smem.kv_full)

    def read_queries(number):
        return tuple(block.queries[number * batch + i] for i in range(batch))

    def visit(n, current, tiles_before):
        heads = pl.ds(current.group * per_group, per_group)
        first, num_batches = current.first_tile * batches, current.num_tiles * batches
        # Tiles that find room without a tile of this slice having been used come first: the last
        # block's keys are still in use.
        before_keys = jnp.minimum(num_batches, slots * batches) - 1

        def gather(i, queries):
            upcoming = read_queries(first + jnp.minimum(i + 1, num_batches - 1))
            number, part = lax.div(i, batches), lax.rem(i, batches)
            slot = lax.rem(tiles_before + number, slots)

            @pl.when(part == 0)
            def _():
                pl.when(tiles_before + number >= slots)(
                    lambda: plgpu.barrier_wait(smem.q_empty.at[slot])
                )
                plgpu.copy_gmem_to_smem(
                    block.statistics.at[current.first_tile + number],
                    smem.statistics.at[slot],
                    smem.q_full.at[slot],
                )

            for place, query in enumerate(queries):
                start = pl.multiple_of((part * batch + place) * per_group, per_group)
                for source, copy in ((block.q, smem.q), (block.do, smem.do)):
                    plgpu.copy_gmem_to_smem(
                        source.at[query, heads],
                        copy.at[slot, pl.ds(start, per_group)],
                        smem.q_full.at[slot],
                    )
            pl.when(i == before_keys)(lambda: copy_keys_and_values(n, current))
            return upcoming

        lax.fori_loop(0, num_batches, gather, read_queries(first))

    num_slices, num_tiles = block.for_each_slice(visit)

    # The last releases are awaited too: a thread block ends when nothing uses its shared memory.
    @pl.loop(jnp.maximum(num_tiles - slots, 0), num_tiles)
    def _(number):
        plgpu.barrier_wait(smem.q_empty.at[lax.rem(number, slots)])

    pl.when(num_slices > 0)(lambda: plgpu.barrier_wait(smem.kv_empty))


def _consume(block: _ThreadBlock, consumer):
    """Goes over all tiles with the 64 keys that are this consumer's."""
    smem, statics = block.smem, block.statics
    zeros = jnp.zeros((CONSUMER_KEYS, statics.head_dim), jnp.float32)
    zeros = plgpu.layout_cast(zeros, MATRIX)

    def visit(n, current, tiles_before):
        plgpu.barrier_wait(smem.kv_full)

        def step(number, gradients):
            return _differentiate(block, consumer, current, number, tiles_before, gradients)

        dk, dv = lax.fori_loop(0, current.num_tiles, step, (zeros, zeros))
        plgpu.barrier_arrive(smem.kv_empty)
        _store(block, consumer, current, dk, dv)

    block.for_each_slice(visit)
    plgpu.wait_smem_to_gmem(0)


def _differentiate(block: _ThreadBlock, consumer, current: Slice, number, tiles_before, gradients):
    """One tile: dK and dV with its share added; its dQ is written if it is this consumer's turn."""
    smem, statics = block.smem, block.statics
    consumer = opaque(consumer, statics.target)
    turn, tile = tiles_before + number, current.first_tile + number
    slot = lax.rem(turn, statics.config.num_query_slots)
    owner = lax.rem(turn, statics.num_consumers)
    p, ds = _probabilities_and_score_gradients(block, consumer, current, tile, slot)
    own_keys = _own_keys(consumer)
    smem.ds[owner, own_keys] = ds
    plgpu.commit_smem()
    plgpu.barrier_arrive(smem.ds_full.at[owner])
    gradients = _add_products(block, consumer, owner, slot, p, ds, gradients)
    plgpu.barrier_arrive(smem.q_empty.at[slot])
    pl.when(owner == consumer)(lambda: _write_query_gradients(block, consumer, tile))
    return gradients


def _own_keys(consumer):
    """The rows of a key block that are this consumer's."""
    return pl.ds(pl.multiple_of(consumer * CONSUMER_KEYS, CONSUMER_KEYS), CONSUMER_KEYS)


def _probabilities_and_score_gradients(block, consumer, current: Slice, tile, slot):
    """P and dS / scale of this consumer's keys and a tile's rows, [64, 64] in 16 bits."""
    smem, statics = block.smem, block.statics
    shape, own_keys = (CONSUMER_KEYS, TILE_ROWS), _own_keys(consumer)
    only = opaque(jnp.int32(0), statics.target)
    first_query = block.queries[tile * (TILE_ROWS // statics.per_group)]
    plgpu.barrier_wait(smem.q_full.at[slot])

    def by_columns(i):
        values = plgpu.load(smem.statistics.at[slot, i], layout=COLUMNS)
        return lax.broadcast_in_dim(values, shape, (1,))

    def multiply(scores_ref, dp_ref):
        plgpu.wgmma(scores_ref, smem.k.at[only, own_keys], smem.q.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp_ref, smem.v.at[only, own_keys], smem.do.at[slot].transpose((1, 0)))
        # The exponentials run under the second product.
        scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
        p = jnp.exp2(scores * (statics.scale * _LOG2_E) - by_columns(0))
        # A list's queries ascend and none precedes the block: those inside it come first.
        p = lax.cond(
            first_query < current.own_query + (statics.block_size - 1),
            lambda: _causal(block, consumer, current, tile, p),
            lambda: p,
        ).astype(smem.q.dtype)
        dp = plgpu.wgmma_accumulator_load(dp_ref)
        ds = p.astype(jnp.float32) * (dp - by_columns(1))
        return p, ds.astype(p.dtype)

    accumulator = plgpu.ACC(shape, jnp.float32)
    return pl.run_scoped(multiply, accumulator, accumulator)


def _causal(block: _ThreadBlock, consumer, current: Slice, tile, p):
    """0 where the key comes after the query."""
    per_tile = TILE_ROWS // block.statics.per_group
    place = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=MATRIX) // block.statics.per_group
    key = plgpu.broadcasted_iota(jnp.int32, p.shape, 0, layout=MATRIX) + consumer * CONSUMER_KEYS

    # A loop, for unrolled it would take registers that are not there.
    def hide(i, p):
        last_key = block.queries[tile * per_tile + i] - current.own_query
        return jnp.where((place == i) & (key > last_key), 0.0, p)

    return lax.fori_loop(0, per_tile, hide, p)


def _add_products(block: _ThreadBlock, consumer, owner, slot, p, ds, gradients):
    """(dK + dS Q, dV + P dO), with the left operands in registers, awaited.

    The interpreter can neither continue accumulators nor take operands from registers.
    """
    smem, (dk, dv) = block.smem, gradients
    q, do = smem.q.at[slot], smem.do.at[slot]
    if block.statics.target.interpret is not None:
        smem.probabilities[consumer] = p
        plgpu.commit_smem()
        return (
            dk + matmul(smem.ds.at[owner, _own_keys(consumer)], q, dk.shape),
            dv + matmul(smem.probabilities.at[consumer], do, dv.shape),
        )

    def multiply(refs):
        plgpu.wgmma(refs[1], p, do)
        plgpu.wgmma(refs[0], ds, q)

    return pl.run_state(multiply)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))


def _write_query_gradients(block: _ThreadBlock, consumer, tile):
    """dQ of a tile from the dS of all consumers."""
    smem, statics = block.smem, block.statics
    plgpu.barrier_wait(smem.ds_full.at[consumer])
    only = opaque(jnp.int32(0), statics.target)
    scores = smem.ds.at[consumer].transpose((1, 0))
    dq = matmul(scores, smem.k.at[only], (TILE_ROWS, statics.head_dim)) * statics.scale
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.dq[consumer] = dq.astype(smem.dq.dtype)
    plgpu.commit_smem()
    copy_streaming(smem.dq.at[consumer], block.dq, tile, statics.target)


def _store(block: _ThreadBlock, consumer, current: Slice, dk, dv):
    """Adds a slice's sums to the whole ones, or puts those of a split list aside."""
    statics = block.statics
    first = current.key_block * statics.block_size + consumer * CONSUMER_KEYS
    first = pl.multiple_of(first, CONSUMER_KEYS)

    @pl.when(current.slot < 0)
    def _():
        for sums, new in ((block.dk, dk), (block.dv, dv)):
            add_to(sums, first, current.group, new, statics.target)

    @pl.when(current.slot >= 0)
    def _():
        for i, new in enumerate((dk, dv)):
            block.parts[current.slot, i, _own_keys(consumer)] = new
