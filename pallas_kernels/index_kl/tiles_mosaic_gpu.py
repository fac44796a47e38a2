"""Teacher and student of the KL on Hopper, tile by tile: 64 queries against one key block.

A worker's tile goes in *steps* of 64 (query, head) pairs: their scores with the key block become
probabilities by the log-sum-exp that attention has left, and a product with a 0/1 matrix adds up
the heads of each query into the teacher, [64 queries, keys], which stays in registers. The index
scores of all 64 queries, one product, then meet it in the same layout. What is made of them is the
*ending* of a kernel: `block_log_sum_exp` needs no teacher, `align_tiles` makes value and gradients.

A NaN or an infinity in one query reaches the queries that share a tile with it, one in a key the
queries that see its block.
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
from pallas_kernels.index_kl.workers_mosaic_gpu import (
    check_shared_memory,
    check_workers,
    drain,
    items_of,
    run_workers,
    wait_for_slot,
    workers_kernel,
)
from pallas_kernels.mosaic_gpu import (
    MATRIX,
    ROWS,
    Target,
    by_rows,
    current_target,
    matmul,
    swizzled,
)

# Rows of a matrix product: (query, head) pairs of a step, queries of a tile.
STEP_ROWS = 64

# Probabilities are multiplied by 2^15 while they are 16-bit numbers, so that float16, the finer one
# for numbers of a known size, holds them down to 2^-29 in full precision.
TEACHER_SHIFT = 15
_PROBABILITY = jnp.float16

_LOG2_E = math.log2(math.e)


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
        check_workers(self, "num_slots", "num_thread_blocks")

    def check(self, width: int, block_size: int) -> None:
        """Raises ValueError if the workers' tiles do not fit into a core's shared memory."""
        slots = self.num_slots * STEP_ROWS * width
        matrices = 2 * block_size * width + TILE_QUERIES * block_size + slots
        check_shared_memory(self, matrices * 2 + TILE_QUERIES * 4)


class TileInputs(NamedTuple):
    """Arrays of the tile kernels; W is the larger of head and index dim, zeros fill the other.

    Attributes:
      q: [queries, Hkv * G, W], G of 8, 16, 32 or 64.
      k: [keys, Hkv, W], whole blocks.
      index_q: [R, 64, W] by row.
      index_k: [keys, W].
      lse: [R, G, 64] of the main scores by row and head, base 2, less TEACHER_SHIFT; infinite for
        heads and queries that are none.
    """

    q: Float[Array, "queries Hq W"]
    k: Float[Array, "keys Hkv W"]
    index_q: Float[Array, "R 64 W"]
    index_k: Float[Array, "keys W"]
    lse: Float[Array, "R G 64"]


class Scales(NamedTuple):
    """Facts of a call that kernels are compiled for; `num_heads` of a group without its padding."""

    block_size: int
    scale: float
    index_scale: float
    num_heads: int


class Ending(NamedTuple):
    """What a kernel does with teacher and student.

    Attributes:
      name: the kernel's.
      finish: finish(worker, tile, slot, teacher), where the index queries lie in that slot; it
        releases slot and index keys.
      has_teacher: or it is None.
      out_type: of the results, which `worker.results` refers to.
    """

    name: str
    finish: Callable[..., None]
    has_teacher: bool
    out_type: tuple[jax.ShapeDtypeStruct, ...]


class _Statics(NamedTuple):
    """What the kernel is compiled for."""

    ending: Ending
    scales: Scales
    per_group: int
    config: TileConfig
    target: Target


class _Scratch(NamedTuple):
    """Shared memory and barriers of a thread block, by worker; the interpreter has `head_sums`.

    `staging` is two names of the same memory, for what is there in turn: a step's probabilities,
    and the gradients of a tile's index scores.
    """

    k: Any
    index_k: Any
    staging: Any
    q: Any
    per_query: Any
    k_full: Any
    k_empty: Any
    q_full: Any
    q_empty: Any
    index_full: Any
    index_empty: Any
    head_sums: Any = None


class _Refs(NamedTuple):
    """Arrays in device memory; `factors` are of `align_tiles` only."""

    q: Any
    k: Any
    index_q: Any
    index_k: Any
    lse: Any
    queries: Any
    tiles: Any
    num_tiles: Any
    factors: Any = None


class Worker(NamedTuple):
    """A worker's number, the references of its thread block, and what it is compiled for."""

    number: jax.Array
    refs: _Refs
    results: tuple
    smem: _Scratch
    statics: _Statics


class Tile(NamedTuple):
    """The number of a row of `Tiles.tiles`, and the row as scalars."""

    number: jax.Array
    group: jax.Array
    key_block: jax.Array
    row_tile: jax.Array
    num_queries: jax.Array
    own_query: jax.Array


_FIELDS = GROUP, KEY_BLOCK, ROW_TILE, NUM_QUERIES, OWN_QUERY


def run_tiles(
    ending: Ending,
    inputs: TileInputs,
    tiles: Tiles,
    scales: Scales,
    config: TileConfig,
    *factors: Float[Array, "R factors 64"],
) -> tuple[jax.Array, ...]:
    """Teacher and student of every tile, and what `ending` makes of them; tiles not in use stay.

    Raises:
      ValueError: the config's tiles take more shared memory than there is.
    """
    width = inputs.q.shape[-1]
    config.check(width, scales.block_size)
    per_group = inputs.q.shape[1] // inputs.k.shape[1]
    statics = _Statics(ending, scales, per_group, config, current_target())
    arrays = *inputs, tiles.queries, tiles.tiles, tiles.num_tiles, *factors
    kernel = workers_kernel(
        functools.partial(_kernel, statics, len(arrays)),
        ending.name,
        config,
        statics.target,
        out_type=ending.out_type,
        scratch=_scratch(statics, width, inputs.q.dtype),
    )
    return kernel(*arrays)


def _scratch(statics: _Statics, width: int, dtype) -> tuple:
    """What `_Scratch` refers to, without its last member on the GPU."""
    workers, slots = statics.config.num_workers, statics.config.num_slots
    block_size = statics.scales.block_size

    def matrix(rows, columns, dtype, *numbers):
        shape = workers, *numbers, rows, columns
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    scratch = _Scratch(
        k=matrix(block_size, width, dtype),
        index_k=matrix(block_size, width, dtype),
        staging=plgpu.RefUnion(
            matrix(TILE_QUERIES, block_size, _PROBABILITY),
            matrix(TILE_QUERIES, block_size, dtype),
        ),
        q=matrix(STEP_ROWS, width, dtype, slots),
        per_query=plgpu.SMEM((workers, TILE_QUERIES), jnp.float32),
        k_full=plgpu.Barrier(num_barriers=workers),
        k_empty=plgpu.Barrier(num_barriers=workers),
        q_full=plgpu.Barrier(
            num_arrivals=STEP_ROWS // statics.per_group, num_barriers=(workers, slots)
        ),
        q_empty=plgpu.Barrier(num_barriers=(workers, slots)),
        index_full=plgpu.Barrier(num_arrivals=2, num_barriers=workers),
        index_empty=plgpu.Barrier(num_barriers=workers),
        head_sums=matrix(TILE_QUERIES, STEP_ROWS, _PROBABILITY),
    )
    return tuple(scratch) if statics.target.interpret is not None else tuple(scratch[:-1])


def _kernel(statics: _Statics, num_inputs: int, *refs):
    num_arrays = num_inputs + len(statics.ending.out_type)
    inputs, results = _Refs(*refs[:num_inputs]), refs[num_inputs:num_arrays]
    smem = _Scratch(*refs[num_arrays:])

    def role(run):
        return lambda number: run(Worker(number, inputs, results, smem, statics))

    run_workers(statics.config.num_workers, role(_consume), role(_produce))


def _for_each_tile(worker: Worker, visit):
    """step = visit(n, tile, step) for the worker's tiles, where `step` counts the slots used.

    Returns how many tiles there were, and the last `step`.
    """
    refs = worker.refs
    first, stride, num_tiles = items_of(worker.statics.config, worker.number, refs.num_tiles[0])

    def read(n):
        number = jnp.minimum(first + n * stride, refs.tiles.shape[0] - 1)
        return Tile(number, *(refs.tiles[number, field] for field in _FIELDS))

    def visit_next(n, carry):
        current, step = carry
        # Read one ahead: the latency of these scalars hides behind a tile's work.
        upcoming = read(n + 1)
        return upcoming, visit(n, current, step)

    _, steps = lax.fori_loop(0, num_tiles, visit_next, (read(0), jnp.int32(0)))
    return num_tiles, steps


def _num_steps(worker: Worker, tile: Tile):
    """Steps until all of a tile's queries have been had, in order; none without a teacher."""
    if not worker.statics.ending.has_teacher:
        return 0
    per_step = STEP_ROWS // worker.statics.per_group
    return lax.div(tile.num_queries + (per_step - 1), per_step)


def _produce(worker: Worker):
    """Keeps the worker's slots full, and loads its key blocks."""
    refs, smem, this = worker.refs, worker.smem, worker.number
    slots, block_size = worker.statics.config.num_slots, worker.statics.scales.block_size
    has_teacher = worker.statics.ending.has_teacher

    def visit(n, tile, step):
        keys = pl.ds(tile.key_block * block_size, block_size)
        num_steps = _num_steps(worker, tile)
        if has_teacher:
            pl.when(n > 0)(lambda: plgpu.barrier_wait(smem.k_empty.at[this]))
            full = smem.k_full.at[this]
            plgpu.copy_gmem_to_smem(refs.k.at[keys, tile.group], smem.k.at[this], full)

        @pl.loop(0, num_steps)
        def _(i):
            wait_for_slot(smem.q_empty, this, step + i, slots)
            _load_step(worker, tile, i, lax.rem(step + i, slots))

        pl.when(n > 0)(lambda: plgpu.barrier_wait(smem.index_empty.at[this]))
        full = smem.index_full.at[this]
        plgpu.copy_gmem_to_smem(refs.index_k.at[keys], smem.index_k.at[this], full)
        # The index queries take a slot as those of one more step would.
        last = step + num_steps
        wait_for_slot(smem.q_empty, this, last, slots)
        slot = lax.rem(last, slots)
        plgpu.copy_gmem_to_smem(refs.index_q.at[tile.row_tile], smem.q.at[this, slot], full)
        return last + 1

    num_tiles, steps = _for_each_tile(worker, visit)
    drain(smem.q_empty, this, steps, slots)

    @pl.when(num_tiles > 0)
    def _():
        if has_teacher:
            plgpu.barrier_wait(smem.k_empty.at[this])
        plgpu.barrier_wait(smem.index_empty.at[this])


def _load_step(worker: Worker, tile: Tile, step, slot):
    """Starts the copies of a step's queries, all heads of one in one piece."""
    refs, smem, this = worker.refs, worker.smem, worker.number
    per_group = worker.statics.per_group
    per_step = STEP_ROWS // per_group
    heads = pl.ds(tile.group * per_group, per_group)

    # A loop, for the producer has few registers.
    @pl.loop(0, per_step)
    def _(place):
        # Behind a tile's last query it is loaded again. Any query would do, for probabilities there
        # are 0, unless it holds a NaN: so it is one whose NaN is in this tile anyway.
        query = refs.queries[
            tile.row_tile, jnp.minimum(step * per_step + place, tile.num_queries - 1)
        ]
        start = pl.multiple_of(place * per_group, per_group)
        plgpu.copy_gmem_to_smem(
            refs.q.at[query, heads],
            smem.q.at[this, slot, pl.ds(start, per_group)],
            smem.q_full.at[this, slot],
        )


def _consume(worker: Worker):
    """Computes the worker's tiles."""
    config, ending = worker.statics.config, worker.statics.ending

    def visit(n, tile, step):
        # The same number, which the compiler cannot know: addresses that it took for constant would
        # stay in registers all the time.
        number = lax.rem(tile.number, config.num_workers)
        same = worker._replace(number=number)
        teacher = _teacher(same, tile, step) if ending.has_teacher else None
        last = step + _num_steps(worker, tile)
        plgpu.barrier_wait(worker.smem.index_full.at[number])
        ending.finish(same, tile, lax.rem(last, config.num_slots), teacher)
        return last + 1

    _for_each_tile(worker, visit)
    plgpu.wait_smem_to_gmem(0)


def _teacher(worker: Worker, tile: Tile, step) -> jax.Array:
    """Sum over heads of the main probabilities * 2^TEACHER_SHIFT, [64 queries, keys], unmasked."""
    smem, this, statics = worker.smem, worker.number, worker.statics
    block_size, slots = statics.scales.block_size, statics.config.num_slots
    shape, probabilities = (STEP_ROWS, block_size), smem.staging[0].at[this]
    factor = statics.scales.scale * _LOG2_E
    plgpu.barrier_wait(smem.k_full.at[this])

    def add_up(accumulator):
        @pl.loop(0, _num_steps(worker, tile))
        def _(i):
            slot = lax.rem(step + i, slots)
            # Its latency hides behind the product.
            lse = load_rows(worker.refs.lse.at[tile.row_tile, i])
            plgpu.barrier_wait(smem.q_full.at[this, slot])
            keys = smem.k.at[this].transpose((1, 0))
            scores = matmul(smem.q.at[this, slot], keys, shape)
            plgpu.barrier_arrive(smem.q_empty.at[this, slot])
            exponents = scores * factor - by_rows(lse, shape)
            # No probability exceeds 1; keys behind the query, masked later, might overflow.
            weights = jnp.exp2(jnp.minimum(exponents, float(TEACHER_SHIFT)))
            probabilities[...] = weights.astype(_PROBABILITY)
            plgpu.commit_smem()
            plgpu.wgmma(accumulator, _head_sums(worker, i), probabilities)
            plgpu.wgmma_wait(0)

        return accumulator[...]

    teacher = pl.run_scoped(add_up, plgpu.ACC((TILE_QUERIES, block_size), jnp.float32))
    plgpu.barrier_arrive(smem.k_empty.at[this])
    return teacher


def load_rows(vector) -> jax.Array:
    """One value per row of a matrix product, from device memory."""
    return plgpu.load(vector, layout=ROWS, optimized=False)


def _head_sums(worker: Worker, step):
    """The 0/1 matrix [64 queries, 64 pairs] that adds each query's heads, for a tile's step."""
    statics = worker.statics
    shape = TILE_QUERIES, STEP_ROWS
    query = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    pair = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    own = query - step * (STEP_ROWS // statics.per_group) == pair // statics.per_group
    sums = jnp.where(own, 1.0, 0.0).astype(_PROBABILITY)
    if statics.target.interpret is None:
        return sums
    # The interpreter takes no operand from registers.
    staging = worker.smem.head_sums.at[worker.number]
    staging[...] = sums
    plgpu.commit_smem()
    return staging


def index_scores(worker: Worker, slot) -> jax.Array:
    """Index scores of the tile, [64 queries, keys], in base 2."""
    scales, this = worker.statics.scales, worker.number
    keys = worker.smem.index_k.at[this].transpose((1, 0))
    scores = matmul(worker.smem.q.at[this, slot], keys, (TILE_QUERIES, scales.block_size))
    return scores * (scales.index_scale * _LOG2_E)


def visible_keys(worker: Worker, tile: Tile) -> jax.Array:
    """Which of the block's keys each query sees, [64 queries, keys]: those up to its own."""
    shape = TILE_QUERIES, worker.statics.scales.block_size
    query = load_rows(worker.refs.queries.at[tile.row_tile])
    keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return keys <= by_rows(query - tile.own_query, shape)
