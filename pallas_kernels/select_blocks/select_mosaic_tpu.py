"""The selection kernel on TPU: scores, exact top-k and the ascending order of one tile at a time.

A *row* is a query in one head; a *tile* is a number of neighbouring rows of one batch row. Nothing
but block ids leaves the kernel. Keys are copied by hand, since how many a tile sees is known only
when it runs: a grid step for each chunk of them would pay for those that no query sees.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.mosaic_tpu import LANES, current_target
from pallas_kernels.select_blocks.scores_mosaic_tpu import KeyCopies, score_chunk
from pallas_kernels.select_blocks.top_k_mosaic_tpu import choose, mark_candidates, write_ascending

# Fields of a tile's range.
FIRST_CHUNK, NUM_CHUNKS, FIRST_GROUP, END_GROUP = range(4)


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How the selection is cut up.

    Attributes:
      rows: of a tile, at most; a multiple of 128. Fewer where the scores of all blocks would not
        fit into `score_bytes`.
      chunk: keys per copy and step of the loop, at most, in whole groups of 8 blocks.
      slots: chunks in VMEM, in flight or in use; at least 2.
      unroll: groups of 8 blocks that the top-k looks at together.
      score_bytes: VMEM for the scores of a tile.
    """

    rows: int = 512
    chunk: int = 2048
    slots: int = 3
    unroll: int = 4
    score_bytes: int = 32 * 2**20

    def __post_init__(self):
        if self.rows < LANES or self.rows % LANES:
            raise ValueError(f"rows={self.rows}: choose a multiple of {LANES}")
        if self.slots < 2:
            raise ValueError(
                f"slots={self.slots}: choose at least 2, one is filled while one is used"
            )
        for field in ("chunk", "unroll", "score_bytes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be >= 1")


@dataclasses.dataclass(frozen=True)
class Options:
    """What selection means: the op's arguments of the same names."""

    block_size: int
    top_k: int
    num_local_blocks: int
    num_sink_blocks: int
    scale: float


class Tiles(NamedTuple):
    """What there is per tile of rows, those of a batch row together.

    There are as many tiles for each of the chip's cores, the last one empty if need be.

    Attributes:
      queries: [tiles, rows, Di].
      own: each row's own block, -1 for a row that selects nothing.
      first: the first block that it sees; None for 0.
      ranges: the first chunk of keys, the number of chunks, and first and end of the groups of 8
        blocks that the tile's rows see.
      query_scales: of 8-bit queries.
    """

    queries: Shaped[Array, "tiles rows Di"]
    own: Int[Array, "tiles 1 rows"]
    first: Int[Array, "tiles 1 rows"] | None
    ranges: Int[Array, "tiles 1 4"]
    query_scales: Float[Array, "tiles 1 rows"] | None


class Keys(NamedTuple):
    """What there is per batch row.

    Attributes:
      keys: stay in HBM.
      scales: of the blocks of 8-bit keys.
    """

    keys: Shaped[Array, "B S Di"]
    scales: Float[Array, "B blocks 1"] | None


def select_tiles(
    tiles: Tiles,
    keys: Keys,
    *,
    options: Options,
    config: SelectConfig,
    chunk: int,
    num_blocks: int,
    tiles_per_row: int,
) -> Int[Array, "tiles K rows"]:
    """The ids of the K best blocks of each row, ascending, then -1.

    Args:
      tiles: queries and where they are.
      keys: of the batch rows.
      options: the op's.
      config: ring and unrolling.
      chunk: keys per copy, a multiple of 8 blocks.
      num_blocks: a multiple of 8 that holds every chunk and `config.unroll - 1` groups more; key
        scales are as many.
      tiles_per_row: tiles of one batch row.
    """
    target = current_target()
    cores = target.chip.num_cores
    num_tiles, rows, index_dim = tiles.queries.shape

    def of_tile(array, **memory):
        """Neighbouring tiles alternate between the cores."""
        index = lambda core, step: (step * cores + core, 0, 0)  # noqa: E731
        return None if array is None else pl.BlockSpec((1, *array.shape[1:]), index, **memory)

    def next_range(core, step):
        return jnp.minimum((step + 1) * cores + core, num_tiles - 1), 0, 0

    def by_row(core, step):
        return jnp.minimum((step * cores + core) // tiles_per_row, keys.keys.shape[0] - 1), 0, 0

    ids = jax.ShapeDtypeStruct((num_tiles, options.top_k, rows), jnp.int32)
    scales_spec = None if keys.scales is None else pl.BlockSpec((1, num_blocks, 1), by_row)
    return pl.pallas_call(
        functools.partial(
            _select_tile, options=options, unroll=config.unroll, tiles_per_row=tiles_per_row
        ),
        grid=(cores, num_tiles // cores),
        in_specs=(
            Tiles(*map(of_tile, tiles))._replace(
                ranges=of_tile(tiles.ranges, memory_space=pltpu.SMEM)
            ),
            pl.BlockSpec((1, 1, 4), next_range, memory_space=pltpu.SMEM),
            Keys(pl.BlockSpec(memory_space=pl.ANY), scales_spec),
        ),
        out_specs=of_tile(ids),
        out_shape=ids,
        scratch_shapes=[
            pltpu.VMEM((index_dim, rows), tiles.queries.dtype),
            pltpu.VMEM((num_blocks, rows), jnp.float32),
            pltpu.VMEM((options.top_k, rows), jnp.int32),
            pltpu.VMEM((config.slots, chunk, index_dim), keys.keys.dtype),
            pltpu.SemaphoreType.DMA((config.slots,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=target.chip.vmem_bytes * 7 // 8,
        ),
        interpret=target.interpret,
        name="select_blocks",
    )(tiles, tiles.ranges, keys)


def _select_tile(
    tile,
    next_ref,
    keys,
    ids_ref,
    queries_ref,
    scores_ref,
    chosen_ref,
    buffers_ref,
    semaphores,
    *,
    options,
    unroll,
    tiles_per_row,
):
    """One tile: all scores that it sees, then the top-k, while the next tile's keys arrive."""
    copies = KeyCopies(keys.keys, buffers_ref, semaphores, options.block_size)
    queries_ref[...] = tile.queries[0].T
    _score(tile.ranges, next_ref, copies, queries_ref, scores_ref, tiles_per_row)
    begin, end = tile.ranges[0, 0, FIRST_GROUP], tile.ranges[0, 0, END_GROUP]
    mark_candidates(
        scores_ref,
        tile.own[0],
        None if tile.first is None else tile.first[0],
        begin,
        end,
        key_scales_ref=None if keys.scales is None else keys.scales.at[0],
        query_scales=None if tile.query_scales is None else tile.query_scales[0],
        scale=options.scale,
        num_local_blocks=options.num_local_blocks,
        num_sink_blocks=options.num_sink_blocks,
        unroll=unroll,
    )
    choose(scores_ref, chosen_ref, begin, end, unroll=unroll)
    write_ascending(chosen_ref, ids_ref.at[0])


def _score(range_ref, next_ref, copies, queries_ref, scores_ref, tiles_per_row: int) -> None:
    """Block maxima of the keys that a tile sees; leaves the next tile's first keys on their way."""
    core, step = pl.program_id(0), pl.program_id(1)
    tile = step * pl.num_programs(0) + core
    row = lax.div(tile, tiles_per_row)
    first_chunk, num_chunks = range_ref[0, 0, FIRST_CHUNK], range_ref[0, 0, NUM_CHUNKS]

    @pl.when(step == 0)
    def _():
        copies.start_first(row, first_chunk, num_chunks)

    def score(number, _):
        copies.start(row, first_chunk, number + copies.slots - 1, num_chunks)
        chunk_ref = copies.wait(row, first_chunk, number)
        first_block = (first_chunk + number) * (chunk_ref.shape[0] // copies.block_size)
        score_chunk(chunk_ref, queries_ref, scores_ref, first_block, block_size=copies.block_size)

    lax.fori_loop(0, num_chunks, score, None)

    @pl.when(step + 1 < pl.num_programs(1))
    def _():
        next_row = lax.div(tile + pl.num_programs(0), tiles_per_row)
        copies.start_first(next_row, next_ref[0, 0, FIRST_CHUNK], next_ref[0, 0, NUM_CHUNKS])
