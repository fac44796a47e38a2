"""Teacher and student of the KL on Hopper, tile by tile: 64 queries against one key block.

A thread block runs independent *workers*, each a consumer warpgroup with a producer of its own. A
worker's tile goes in *steps* of 64 (query, head) pairs: their scores with the key block become
probabilities by the log-sum-exp that attention has left, and a product with a 0/1 matrix adds up
the heads of each query into the teacher, [64 queries, keys], which stays in registers. The index
scores of all 64 queries, one product, then meet it in the same layout. `block_terms` writes from
them what the value needs, `score_gradients` the gradients of the index scores and queries.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_kl.tiles import (
    GROUP,
    KEY_BLOCK,
    NUM_QUERIES,
    OWN_QUERY,
    ROW_TILE,
    TILE_QUERIES,
    Tiles,
)
from pallas_kernels.mosaic_gpu import (
    MATRIX,
    ROWS,
    SHARED_MEMORY_BYTES,
    Target,
    by_rows,
    current_target,
    matmul,
    swizzled,
)

# Rows of a matrix product: (query, head) pairs of a step, queries of a tile.
STEP_ROWS = 64

# Probabilities are multiplied by 2^15 while they are 16-bit numbers, so that float16 holds them
# down to 2^-29 in full precision.
TEACHER_SHIFT = 15

# What the value needs of each query and block; see `block_terms`.
LSE, DIVERGENCE, MASS = range(3)
NUM_TERMS = 3
# What the gradient needs of each query; see `score_gradients`.
STUDENT_LSE, STUDENT_FACTOR, TEACHER_FACTOR = range(3)
NUM_FACTORS = 3

_LOG2_E = math.log2(math.e)
_PRODUCER_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Shape of the tile kernels.

    Attributes:
      num_workers: per thread block, 1 or 2; each has a key block, an index key block, a tile of
        probabilities and its slots in shared memory.
      num_slots: steps' queries in flight per worker.
      num_thread_blocks: that share the tiles; one per core of the GPU.
    """

    num_workers: int = 2
    num_slots: int = 2
    num_thread_blocks: int = 132

    def __post_init__(self):
        if self.num_workers not in (1, 2):
            raise ValueError(f"num_workers={self.num_workers} must be 1 or 2: registers are few")
        for field in ("num_slots", "num_thread_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")

    def check(self, width: int, block_size: int) -> None:
        """Raises ValueError if the workers' tiles do not fit into a core's shared memory."""
        slots = self.num_slots * STEP_ROWS * width
        matrices = 2 * block_size * width + TILE_QUERIES * block_size + slots
        needed = self.num_workers * (matrices * 2 + NUM_TERMS * TILE_QUERIES * 4) + 1024
        if needed > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"num_workers={self.num_workers} with num_slots={self.num_slots} need {needed} "
                f"bytes of shared memory, there are {SHARED_MEMORY_BYTES}; lower one of them"
            )


class TileInputs(NamedTuple):
    """Arrays of the tile kernels; W is the larger of head and index dim, zeros fill the other.

    Attributes:
      q: [queries, Hkv * G, W], G of 8, 16, 32 or 64.
      k: [keys, Hkv, W], whole blocks.
      index_q: [R, 64, W] by row.
      index_k: [keys, W].
      lse: [R, 64 * G / 64, 64] of the main scores by row and head, base 2, less TEACHER_SHIFT;
        infinite for heads and queries that are none.
    """

    q: Float[Array, "queries Hq W"]
    k: Float[Array, "keys Hkv W"]
    index_q: Float[Array, "R 64 W"]
    index_k: Float[Array, "keys W"]
    lse: Float[Array, "R steps 64"]


class Scales(NamedTuple):
    """Facts of a call that kernels are compiled for; `num_heads` of a group without its padding."""

    block_size: int
    scale: float
    index_scale: float
    num_heads: int


def block_terms(
    inputs: TileInputs, tiles: Tiles, scales: Scales, config: TileConfig
) -> Float[Array, "M terms 64"]:
    """What each tile's queries and block contribute to the value, in base 2.

    Returns:
      Over the block's visible keys j, with teacher t and index scores x: LSE the log-sum-exp of x,
      DIVERGENCE the sum of t (log t - x + LSE), MASS the sum of t. Rows of nobody may hold
      anything.
    """
    out = jax.ShapeDtypeStruct((len(tiles.tiles), NUM_TERMS, TILE_QUERIES), jnp.float32)
    # float16 is the finer one for numbers of a known size.
    call = _call(_write_terms, "index_kl_terms", inputs, scales, config, jnp.float16, (out,))
    (terms,) = call(*inputs, tiles.queries, tiles.tiles, tiles.num_tiles)
    return terms


def score_gradients(
    inputs: TileInputs,
    factors: Float[Array, "R factors 64"],
    tiles: Tiles,
    scales: Scales,
    config: TileConfig,
) -> tuple[Float[Array, "M 64 Bk"], Float[Array, "M 64 W"]]:
    """Gradients of each tile's index scores, and of its index queries through these.

    Args:
      inputs: see there.
      factors: by row: STUDENT_LSE the base-2 log-sum-exp of the index scores, and what student and
        teacher are multiplied with. The teacher has not been divided by 2^TEACHER_SHIFT * G.
      tiles: see there.
      scales: see there.
      config: the kernel's shape.

    Returns:
      STUDENT_FACTOR * student - TEACHER_FACTOR * teacher and its product with the index keys, in
      their dtype; 0 in rows of nobody.
    """
    dtype, width = inputs.index_k.dtype, inputs.index_k.shape[-1]
    shape = len(tiles.tiles), TILE_QUERIES
    out = (
        jax.ShapeDtypeStruct((*shape, scales.block_size), dtype),
        jax.ShapeDtypeStruct((*shape, width), dtype),
    )
    call = _call(_write_gradients, "index_kl_gradients", inputs, scales, config, dtype, out)
    return call(*inputs, tiles.queries, tiles.tiles, tiles.num_tiles, factors)


class _Statics(NamedTuple):
    """What the kernel is compiled for."""

    finish: Callable
    scales: Scales
    per_group: int
    dtype: Any
    config: TileConfig
    target: Target


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, by worker."""

    k: Any
    index_k: Any
    probabilities: Any
    q: Any
    terms: Any
    k_full: Any
    k_empty: Any
    q_full: Any
    q_empty: Any
    index_full: Any
    index_empty: Any
    head_sums: Any = None


class _Refs(NamedTuple):
    """Arrays in device memory; `factors` of the gradient only."""

    q: Any
    k: Any
    index_q: Any
    index_k: Any
    lse: Any
    queries: Any
    tiles: Any
    num_tiles: Any
    factors: Any


class _Worker(NamedTuple):
    """A worker's number, the references of its thread block, and what it is compiled for."""

    number: jax.Array
    refs: _Refs
    results: tuple
    smem: _Scratch
    statics: _Statics


class _Tile(NamedTuple):
    """The number of a row of `Tiles.tiles`, and the row as scalars."""

    number: jax.Array
    group: jax.Array
    key_block: jax.Array
    row_tile: jax.Array
    num_queries: jax.Array
    own_query: jax.Array


_FIELDS = GROUP, KEY_BLOCK, ROW_TILE, NUM_QUERIES, OWN_QUERY


def _call(finish, name, inputs: TileInputs, scales: Scales, config: TileConfig, dtype, out):
    """The kernel that ends each tile with `finish`, with probabilities of `dtype`."""
    target, width = current_target(), inputs.q.shape[-1]
    config.check(width, scales.block_size)
    per_group = inputs.q.shape[1] // inputs.k.shape[1]
    statics = _Statics(finish, scales, per_group, dtype, config, target)
    return plgpu.kernel(
        functools.partial(_kernel, statics, len(out)),
        out_type=out,
        scratch_types=_scratch(statics, width, inputs),
        grid=(config.num_thread_blocks,),
        grid_names=("thread_block",),
        num_threads=2 * config.num_workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name=name,
    )


def _scratch(statics: _Statics, width: int, inputs: TileInputs) -> tuple:
    """What `_Scratch` refers to; only the interpreter has its last member."""
    (workers, slots, _), block_size = _sizes(statics.config), statics.scales.block_size

    def matrix(rows, columns, dtype, *numbers):
        shape = workers, *numbers, rows, columns
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    scratch = _Scratch(
        k=matrix(block_size, width, inputs.k.dtype),
        index_k=matrix(block_size, width, inputs.index_k.dtype),
        probabilities=matrix(TILE_QUERIES, block_size, statics.dtype),
        q=matrix(STEP_ROWS, width, inputs.q.dtype, slots),
        terms=plgpu.SMEM((workers, NUM_TERMS, TILE_QUERIES), jnp.float32),
        k_full=plgpu.Barrier(num_barriers=workers),
        k_empty=plgpu.Barrier(num_barriers=workers),
        q_full=plgpu.Barrier(
            num_arrivals=STEP_ROWS // statics.per_group, num_barriers=(workers, slots)
        ),
        q_empty=plgpu.Barrier(num_barriers=(workers, slots)),
        index_full=plgpu.Barrier(num_arrivals=2, num_barriers=workers),
        index_empty=plgpu.Barrier(num_barriers=workers),
        head_sums=matrix(TILE_QUERIES, STEP_ROWS, statics.dtype),
    )
    return tuple(scratch) if statics.target.interpret is not None else tuple(scratch[:-1])


def _sizes(config: TileConfig) -> tuple[int, int, int]:
    return config.num_workers, config.num_slots, config.num_thread_blocks


def _kernel(statics: _Statics, num_results: int, *refs):
    """Consumers first, then as many producers."""
    workers = statics.config.num_workers
    num_inputs = len(_Refs._fields) - (statics.finish is _write_terms)
    inputs = _Refs(*(*refs[:num_inputs], None)[: len(_Refs._fields)])
    results = refs[num_inputs : num_inputs + num_results]
    smem = _Scratch(*refs[num_inputs + num_results :])
    warpgroup = lax.axis_index("warpgroup")
    registers = min(232, 512 // workers - _PRODUCER_REGISTERS)

    @pl.when(warpgroup < workers)
    def _():
        plgpu.set_max_registers(registers // 8 * 8, action="increase")
        _consume(_Worker(warpgroup, inputs, results, smem, statics))

    @pl.when(warpgroup >= workers)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(_Worker(warpgroup - workers, inputs, results, smem, statics))


def _for_each_tile(worker: _Worker, visit):
    """step = visit(n, tile, step) for the worker's tiles, where `step` counts the slots used.

    Returns how many tiles there were, and the last `step`.
    """
    refs = worker.refs
    workers, _, thread_blocks = _sizes(worker.statics.config)
    first, stride = (
        lax.axis_index("thread_block") * workers + worker.number,
        thread_blocks * workers,
    )
    num_tiles = lax.div(refs.num_tiles[0] - first + (stride - 1), stride)

    def read(n):
        number = jnp.minimum(first + n * stride, refs.tiles.shape[0] - 1)
        return _Tile(number, *(refs.tiles[number, field] for field in _FIELDS))

    def visit_next(n, carry):
        current, step = carry
        # Read one ahead: the latency of these scalars hides behind a tile's work.
        upcoming = read(n + 1)
        return upcoming, visit(n, current, step)

    _, steps = lax.fori_loop(0, num_tiles, visit_next, (read(0), jnp.int32(0)))
    return num_tiles, steps


def _num_steps(worker: _Worker, tile: _Tile):
    """Steps until all of a tile's queries have been had, in order."""
    per_step = STEP_ROWS // worker.statics.per_group
    return lax.div(tile.num_queries + (per_step - 1), per_step)


def _produce(worker: _Worker):
    """Keeps the worker's slots full, and loads its key blocks."""
    refs, smem, this = worker.refs, worker.smem, worker.number
    (_, slots, _), (block_size, *_) = _sizes(worker.statics.config), worker.statics.scales
    per_group = worker.statics.per_group
    per_step = STEP_ROWS // per_group

    def wait_for_slot(step):
        pl.when(step >= slots)(lambda: plgpu.barrier_wait(smem.q_empty.at[this, step % slots]))

    def visit(n, tile, step):
        pl.when(n > 0)(lambda: plgpu.barrier_wait(smem.k_empty.at[this]))
        keys = pl.ds(tile.key_block * block_size, block_size)
        plgpu.copy_gmem_to_smem(refs.k.at[keys, tile.group], smem.k.at[this], smem.k_full.at[this])
        heads = pl.ds(tile.group * per_group, per_group)
        num_steps = _num_steps(worker, tile)

        @pl.loop(0, num_steps)
        def _(i):
            wait_for_slot(step + i)
            slot = lax.rem(step + i, slots)

            # A loop, for the producer has few registers.
            @pl.loop(0, per_step)
            def _(place):
                # Behind a tile's last query any will do: its probabilities are 0.
                query = jnp.maximum(refs.queries[tile.row_tile, i * per_step + place], 0)
                start = pl.multiple_of(place * per_group, per_group)
                plgpu.copy_gmem_to_smem(
                    refs.q.at[query, heads],
                    smem.q.at[this, slot, pl.ds(start, per_group)],
                    smem.q_full.at[this, slot],
                )

        pl.when(n > 0)(lambda: plgpu.barrier_wait(smem.index_empty.at[this]))
        full = smem.index_full.at[this]
        plgpu.copy_gmem_to_smem(refs.index_k.at[keys], smem.index_k.at[this], full)
        # The index queries take a slot as those of one more step would.
        last = step + num_steps
        wait_for_slot(last)
        slot = lax.rem(last, slots)
        plgpu.copy_gmem_to_smem(refs.index_q.at[tile.row_tile], smem.q.at[this, slot], full)
        return last + 1

    num_tiles, steps = _for_each_tile(worker, visit)

    # The last releases are awaited too: a thread block ends when nothing uses its shared memory.
    @pl.loop(jnp.maximum(steps - slots, 0), steps)
    def _(step):
        plgpu.barrier_wait(smem.q_empty.at[this, lax.rem(step, slots)])

    @pl.when(num_tiles > 0)
    def _():
        plgpu.barrier_wait(smem.k_empty.at[this])
        plgpu.barrier_wait(smem.index_empty.at[this])


def _consume(worker: _Worker):
    """Computes the worker's tiles."""

    def visit(n, tile, step):
        # The same number, which the compiler cannot know: addresses that it took for constant would
        # stay in registers all the time.
        number = lax.rem(tile.number, worker.statics.config.num_workers)
        same = worker._replace(number=number)
        teacher = _teacher(same, tile, step)
        last = step + _num_steps(worker, tile)
        plgpu.barrier_wait(worker.smem.index_full.at[number])
        worker.statics.finish(same, tile, lax.rem(last, worker.statics.config.num_slots), teacher)
        return last + 1

    _for_each_tile(worker, visit)
    plgpu.wait_smem_to_gmem(0)


def _teacher(worker: _Worker, tile: _Tile, step) -> jax.Array:
    """Sum over heads of the main probabilities * 2^TEACHER_SHIFT, [64 queries, keys], unmasked."""
    smem, this, statics = worker.smem, worker.number, worker.statics
    block_size, slots = statics.scales.block_size, statics.config.num_slots
    shape = STEP_ROWS, block_size
    factor = statics.scales.scale * _LOG2_E
    plgpu.barrier_wait(smem.k_full.at[this])

    def add_up(accumulator):
        @pl.loop(0, _num_steps(worker, tile))
        def _(i):
            slot = lax.rem(step + i, slots)
            # Its latency hides behind the product.
            lse = _load_rows(worker.refs.lse.at[tile.row_tile, i])
            plgpu.barrier_wait(smem.q_full.at[this, slot])
            keys = smem.k.at[this].transpose((1, 0))
            scores = matmul(smem.q.at[this, slot], keys, shape)
            plgpu.barrier_arrive(smem.q_empty.at[this, slot])
            exponents = scores * factor - by_rows(lse, shape)
            # No probability exceeds 1; keys behind the query, masked later, might overflow.
            weights = jnp.exp2(jnp.minimum(exponents, float(TEACHER_SHIFT)))
            smem.probabilities.at[this][...] = weights.astype(statics.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(accumulator, _head_sums(worker, i), smem.probabilities.at[this])
            plgpu.wgmma_wait(0)

        return accumulator[...]

    teacher = pl.run_scoped(add_up, plgpu.ACC((TILE_QUERIES, block_size), jnp.float32))
    plgpu.barrier_arrive(smem.k_empty.at[this])
    return teacher


def _load_rows(vector) -> jax.Array:
    """One value per row of a matrix product, from device memory."""
    return plgpu.load(vector, layout=ROWS, optimized=False)


def _head_sums(worker: _Worker, step):
    """The 0/1 matrix [64 queries, 64 pairs] that adds each query's heads, for a tile's step."""
    statics = worker.statics
    shape = TILE_QUERIES, STEP_ROWS
    query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    pair = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    own = query - step * (STEP_ROWS // statics.per_group) == pair // statics.per_group
    sums = jnp.where(own, 1.0, 0.0).astype(statics.dtype)
    if statics.target.interpret is None:
        return sums
    # The interpreter takes no operand from registers.
    staging = worker.smem.head_sums.at[worker.number]
    staging[...] = sums
    plgpu.commit_smem()
    return staging


def _index_scores(worker: _Worker, slot) -> jax.Array:
    """Index scores of the tile, [64 queries, keys], in base 2."""
    keys = worker.smem.index_k.at[worker.number].transpose((1, 0))
    queries = worker.smem.q.at[worker.number, slot]
    if queries.dtype != keys.dtype:
        raise NotImplementedError("index and main inputs share a dtype")
    scores = matmul(queries, keys, (TILE_QUERIES, worker.statics.scales.block_size))
    return scores * (worker.statics.scales.index_scale * _LOG2_E)


def _visible(worker: _Worker, tile: _Tile) -> jax.Array:
    """Which of the block's keys each query sees: those up to its own."""
    shape = TILE_QUERIES, worker.statics.scales.block_size
    query = _load_rows(worker.refs.queries.at[tile.row_tile])
    keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return keys <= by_rows(query - tile.own_query, shape)


def _write_terms(worker: _Worker, tile: _Tile, slot, teacher):
    """Ends a tile of `block_terms`."""
    smem, this = worker.smem, worker.number
    scores = _index_scores(worker, slot)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
    shape = TILE_QUERIES, worker.statics.scales.block_size
    visible = _visible(worker, tile)
    scores = jnp.where(visible, scores, -jnp.inf)
    teacher = teacher * (2.0**-TEACHER_SHIFT / worker.statics.scales.num_heads)
    teacher = jnp.where(visible, teacher, 0.0)
    peak = scores.max(axis=1)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    lse = shift + jnp.log2(jnp.exp2(scores - by_rows(shift, shape)).sum(axis=1))
    terms = teacher * (jnp.log2(teacher) - scores + by_rows(lse, shape))
    divergence = jnp.where(teacher > 0.0, terms, 0.0).sum(axis=1)
    # The copy of the tile before has read them.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for term, value in ((LSE, lse), (DIVERGENCE, divergence), (MASS, teacher.sum(axis=1))):
        smem.terms.at[this, term][...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.terms.at[this], worker.results[0].at[tile.number])


def _write_gradients(worker: _Worker, tile: _Tile, slot, teacher):
    """Ends a tile of `score_gradients`."""
    smem, this = worker.smem, worker.number
    shape = TILE_QUERIES, worker.statics.scales.block_size

    def factor(column):
        return by_rows(_load_rows(worker.refs.factors.at[tile.row_tile, column]), shape)

    # No more than teacher and index scores at a time, for registers are few.
    teacher = teacher * factor(TEACHER_FACTOR)
    scores = _index_scores(worker, slot)
    # No probability exceeds 1; keys behind the query, masked below, might overflow.
    student = jnp.exp2(jnp.minimum(scores - factor(STUDENT_LSE), 0.0))
    gradient = student * factor(STUDENT_FACTOR) - teacher
    gradient = jnp.where(_visible(worker, tile), gradient, 0.0)
    gradients = smem.probabilities.at[this]
    gradients[...] = gradient.astype(gradients.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(gradients, worker.results[0].at[tile.number])
    queries = smem.q.at[this, slot]
    queries[...] = matmul(gradients, smem.index_k.at[this], queries.shape).astype(queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, worker.results[1].at[tile.number])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(smem.q_empty.at[this, slot])
    plgpu.barrier_arrive(smem.index_empty.at[this])
