"""What the KL kernels of a TPU share: tiles of queries that go through blocks of keys.

A tile is R neighbouring queries of one group with its G heads. Rows of the main product are (head,
query), so that the mean over heads is a sum of registers, and what follows has R rows.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import LANES, Target, in_hbm, product
from pallas_kernels.sparse_attention.forward_mosaic_tpu import visible
from pallas_kernels.sparse_attention.ring_mosaic_tpu import Ring, tiles_in_turn
from pallas_kernels.sparse_attention.tile_lists import BLOCK

# Log-sum-exp of a query that sees nothing: its probabilities are 0.
NOTHING = 1e30

# Lanes of `Tiles.statistics`; before them the log-sum-exp of each head. Both in units of log 2.
# With t and s the probabilities of teacher (a sum over heads) and student, the gradient of an index
# score is STUDENT * s - TEACHER * t. START is the first key slot that the query sees.
INDEX_LSE, STUDENT, TEACHER, START = range(64, 68)


@dataclasses.dataclass(frozen=True)
class IndexKLConfig:
    """How the kernels go through tiles and blocks.

    Attributes:
      queries: per tile, 8, 16, 24 or 32.
      blocks_per_step: key blocks fetched at once, a divisor of 32.
      blocks_per_part: multiplied at once, an even divisor of blocks_per_step.
      tiles_per_step: tiles fetched at once for a key block.
      tiles_per_part: multiplied at once, a divisor of tiles_per_step.
      tiles_per_slice: at most, of the list of a key block; a multiple of tiles_per_step.
      depth: steps in flight, a power of two.
    """

    queries: int = 16
    blocks_per_step: int = 8
    blocks_per_part: int = 4
    tiles_per_step: int = 8
    tiles_per_part: int = 4
    tiles_per_slice: int = 512
    depth: int = 4

    def __post_init__(self):
        if self.queries not in (8, 16, 24, 32):
            raise ValueError(f"queries={self.queries}: must be 8, 16, 24 or 32, a bit each")
        if self.depth < 2 or self.depth & (self.depth - 1):
            raise ValueError(f"depth={self.depth}: must be a power of two from 2 on")
        if self.blocks_per_part < 2 or self.blocks_per_part % 2:
            raise ValueError(f"blocks_per_part={self.blocks_per_part}: must be even, whole lanes")
        if self.tiles_per_part < 1:
            raise ValueError(f"tiles_per_part={self.tiles_per_part}: must be >= 1")
        for whole, part in (
            ("blocks_per_step", "blocks_per_part"),
            ("tiles_per_step", "tiles_per_part"),
            ("tiles_per_slice", "tiles_per_step"),
        ):
            size, unit = getattr(self, whole), getattr(self, part)
            if size < unit or size % unit:
                raise ValueError(f"{whole}={size}: must be a multiple of {part}={unit}")
        if 32 % self.blocks_per_step:
            raise ValueError(f"blocks_per_step={self.blocks_per_step}: must be a divisor of 32")


class Scales(NamedTuple):
    """What the kernels' bodies know of a call.

    Attributes:
      heads: G, per group.
      main: factor of the main scores, to units of log 2.
      index: factor of the index scores, to units of log 2.
      starts: whether queries see their blocks from START on only.
    """

    heads: int
    main: float
    index: float
    starts: bool


class Tiles(NamedTuple):
    """The arrays of a call, by tile or by block of one head; tiles by batch row, then group.

    Attributes:
      lists: see `tile_lists`.
      q: rows (head, query).
      index_q: in float32, whose tiles of 8 queries lie as they are multiplied.
      statistics: per query, at the lanes above.
      keys: main keys, pages by batch row, group, block.
      index_keys: the same block of index keys for each of these.
    """

    lists: Int[Array, "tiles 4 L"]
    q: Float[Array, "tiles rows D"]
    index_q: Float[Array, "tiles R Di"]
    statistics: Float[Array, "tiles R 128"]
    keys: Float[Array, "pages Bk D"]
    index_keys: Float[Array, "pages Bk Di"]


def teacher(q, keys, lse: list[Any], factor: float):
    """Probabilities summed over the heads, [R, keys], also of keys that a query does not see.

    Args:
      q: [G * R, D].
      keys: [keys, D].
      lse: of each head, [R, LANES], the same in all lanes, or [R, 1].
      factor: of the scores, to the units of lse.
    """
    scores = product(q, keys, 1) * factor
    queries = lse[0].shape[0]
    heads = [
        jnp.exp2(scores[h * queries : (h + 1) * queries] - rows[:, : scores.shape[1]])
        for h, rows in enumerate(lse)
    ]
    return functools.reduce(operator.add, heads)


def head_lse(statistics, heads: int) -> list[Any]:
    """The log-sum-exp of each head in all lanes."""
    shape = statistics.shape[0], LANES
    return [jnp.broadcast_to(statistics[:, h : h + 1], shape) for h in range(heads)]


def over_tiles(
    body: Callable[..., None],
    tiles: Tiles,
    sources: tuple[Array, ...],
    *,
    results: tuple[int, ...],
    sums: tuple[tuple[int, int], ...],
    config: IndexKLConfig,
    target: Target,
    name: str,
) -> tuple[Array, ...]:
    """Runs a kernel on each tile: arrays [tiles, R, width] per result.

    Args:
      body: called with the refs of q, index_q and statistics, those of the results, those of the
        sums, the tile's list and the ring of the sources.
      tiles: the call.
      sources: what comes through the ring, [pages, Bk, width].
      results: width of each result, float32.
      sums: shapes of float32 scratch.
      config: the kernel's shape.
      target: what the kernel is traced for.
      name: of the kernel.
    """
    turn = tiles_in_turn(tiles.lists, target.chip.num_cores)

    def program(now, after, q, index_q, statistics, *refs):
        hbm, refs = refs[: len(sources)], refs[len(sources) :]
        outputs, refs = refs[: len(results)], refs[len(results) :]
        buffers, (semaphores, state, *scratch) = refs[: len(sources)], refs[len(sources) :]
        i = pl.program_id(1)
        has_next = i < pl.num_programs(1) - 1
        ring = Ring(now, after, has_next, hbm, buffers, semaphores, state)
        pl.when(i == 0)(ring.reset)
        body(q, index_q, statistics, *outputs, *scratch, now, ring)

    def block(array):
        return pl.BlockSpec((1, *array.shape[1:]), lambda core, i: (turn.number(core, i), 0, 0))

    rows = config.blocks_per_step * tiles.keys.shape[1]
    outputs = [
        jax.ShapeDtypeStruct((tiles.lists.shape[0], config.queries, width), jnp.float32)
        for width in results
    ]
    return pl.pallas_call(
        program,
        grid=turn.grid,
        in_specs=[
            *turn.lists,
            *(block(array) for array in (tiles.q, tiles.index_q, tiles.statistics)),
            *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in sources),
        ],
        out_specs=[block(array) for array in outputs],
        out_shape=outputs,
        scratch_shapes=[
            *(pltpu.VMEM((config.depth, rows, x.shape[2]), x.dtype) for x in sources),
            pltpu.SemaphoreType.DMA((len(sources), config.depth)),
            pltpu.SMEM((2,), jnp.int32),
            *(pltpu.VMEM(shape, jnp.float32) for shape in sums),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,
            vmem_limit_bytes=target.chip.vmem_bytes // 2,
        ),
        interpret=target.interpret,
        name=name,
    )(
        tiles.lists,
        tiles.lists,
        tiles.q,
        tiles.index_q,
        tiles.statistics,
        *in_hbm(*sources, target=target),
    )


def pieces(ring: Ring, config: IndexKLConfig, step, count: int, start=None):
    """Cuts the first `count` blocks of a step into keys for all lanes.

    Yields the rows of the ring's buffers and which of their keys each query sees, [R, LANES].

    Args:
      ring: of a tile's blocks.
      config: the kernel's shape.
      step: of the ring.
      count: blocks.
      start: [R, 1], the first key slot that each query sees; None: all of its blocks.
    """
    size = ring.block_size
    per_piece = LANES // size
    for place in range(0, count, per_piece):
        entry = step * config.blocks_per_step + place
        seen = visible(ring.now, entry, per_piece, config.queries, size)
        if start is not None:
            slots = [
                ring.now[0, BLOCK, entry + i] * size
                + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
                for i in range(per_piece)
            ]
            seen &= jnp.concatenate(slots, axis=1) >= start
        yield pl.ds(place * size, LANES), seen


def first_slots(statistics, scales: Scales):
    """The first key slot that each query sees, [R, 1], or None."""
    return statistics[:, START : START + 1].astype(jnp.int32) if scales.starts else None
