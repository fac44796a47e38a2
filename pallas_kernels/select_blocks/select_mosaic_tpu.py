"""The selection kernel on TPU: scores, exact top-k and the ascending order of one tile at a time.

A *row* is a query in one head; a *tile* is a number of neighbouring rows of one batch row. Nothing
but block ids leaves the kernel. Keys are copied by hand, since how many a tile sees is known only
when it runs: a grid step for each chunk of them would pay for those that no query sees.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.mosaic_tpu import LANES, SUBLANES, current_target, in_hbm
from pallas_kernels.select_blocks.scores_mosaic_tpu import KeyCopies, KeyRange, score_chunk
from pallas_kernels.select_blocks.top_k_mosaic_tpu import choose, mark_candidates, write_ascending

# Fields of a tile's range.
FIRST_CHUNK, NUM_CHUNKS, FIRST_GROUP, END_GROUP = range(4)


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How the selection is cut up.

    Attributes:
      rows: of a tile, at most; a multiple of 128. Fewer where the scores of all blocks would not
        fit into `score_bytes`.
      products: of a key and a row in a step of the loop over keys, at most. A step copies a chunk
        of keys, in whole groups of 8 blocks: the fewer the rows, the longer, as copies need it.
      slots: chunks in VMEM, in flight or in use; at least 2.
      unroll: groups of 8 blocks that the top-k looks at together.
      score_bytes: VMEM for the scores of a tile.
    """

    rows: int = 1024
    products: int = 2**20
    slots: int = 3
    unroll: int = 4
    score_bytes: int = 36 * 2**20

    def __post_init__(self):
        if self.rows < LANES or self.rows % LANES:
            raise ValueError(f"rows={self.rows}: choose a multiple of {LANES}")
        if self.slots < 2:
            raise ValueError(
                f"slots={self.slots}: choose at least 2, one is filled while one is used"
            )
        for field in ("products", "unroll", "score_bytes"):
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
    """What there is per tile: arrays, how they are cut, or one tile's references.

    Tiles of a batch row come together, as many for each of the chip's cores; the last one may be
    empty.

    Attributes:
      queries: [tiles, rows, Di].
      own: [tiles, 1, rows] each row's own block, -1 for a row that selects nothing.
      first: [tiles, 1, rows] the first block that it sees; None for 0.
      ranges: [tiles, 1, 4] the first chunk of keys, the number of chunks, and first and end of the
        groups of 8 blocks that the tile's rows see.
      query_scales: [tiles, 1, rows] of 8-bit queries, else None.
    """

    queries: Any
    own: Any
    first: Any
    ranges: Any
    query_scales: Any


class Keys(NamedTuple):
    """What there is per batch row: arrays, how they are cut, or references.

    Attributes:
      keys: [B, S, Di], or [P, Bk, Di] in pages; stay in HBM.
      scales: [B, blocks, 1] of the blocks of 8-bit keys, else None.
      pages: [B, 1, blocks] the page of each block; None where keys are not in pages.
    """

    keys: Any
    scales: Any
    pages: Any


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
      num_blocks: a multiple of 8 that holds every chunk and `config.unroll - 1` groups more; scales
        and pages are as many.
      tiles_per_row: tiles of one batch row.
    """
    target = current_target()
    cores = target.chip.num_cores
    num_tiles, rows, index_dim = tiles.queries.shape

    def spec(array, step, row=False, **memory):
        """One tile's block, or its batch row's. Neighbouring tiles alternate between cores."""
        if array is None:
            return None
        per_block, last = tiles_per_row if row else 1, array.shape[0] - 1

        def index(core, now):
            return jnp.minimum(((now + step) * cores + core) // per_block, last), 0, 0

        return pl.BlockSpec((1, *array.shape[1:]), index, **memory)

    def scalars(step):
        """Of this step's tile, or the next one's."""
        return (
            spec(tiles.ranges, step, memory_space=pltpu.SMEM),
            spec(keys.pages, step, row=True, memory_space=pltpu.SMEM),
        )

    ids = jax.ShapeDtypeStruct((num_tiles, options.top_k, rows), jnp.int32)
    ranges, pages = scalars(0)
    keys = keys._replace(keys=in_hbm(keys.keys, target=target)[0])
    return pl.pallas_call(
        functools.partial(
            _select_tile, options=options, unroll=config.unroll, tiles_per_row=tiles_per_row
        ),
        grid=(cores, num_tiles // cores),
        in_specs=(
            Tiles(*(spec(array, 0) for array in tiles))._replace(ranges=ranges),
            Keys(pl.BlockSpec(memory_space=pl.ANY), spec(keys.scales, 0, row=True), pages),
            scalars(1),
        ),
        out_specs=spec(ids, 0),
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
    )(tiles, keys, (tiles.ranges, keys.pages))


def _select_tile(
    tile,
    keys,
    next_scalars,
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
    number = pl.program_id(1) * pl.num_programs(0) + pl.program_id(0)
    seen = _key_range(number, tile.ranges, keys.pages, tiles_per_row)
    next_ranges, next_pages = next_scalars
    following = _key_range(number + pl.num_programs(0), next_ranges, next_pages, tiles_per_row)
    queries_ref[...] = tile.queries[0].T
    _score(seen, following, copies, queries_ref, scores_ref)
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


def _key_range(tile, ranges_ref, pages_ref, tiles_per_row: int) -> KeyRange:
    """What the tile of this number sees."""
    return KeyRange(
        row=lax.div(tile, tiles_per_row),
        first_chunk=ranges_ref[0, 0, FIRST_CHUNK],
        num_chunks=ranges_ref[0, 0, NUM_CHUNKS],
        end_block=ranges_ref[0, 0, END_GROUP] * SUBLANES,
        pages_ref=pages_ref,
    )


def _score(seen: KeyRange, following: KeyRange, copies: KeyCopies, queries_ref, scores_ref):
    """Block maxima of the keys that a tile sees; leaves the next tile's first keys on their way."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        copies.start_first(seen)

    def score(number, _):
        copies.start(seen, number + copies.slots - 1)
        chunk_ref = copies.wait(seen, number)
        first_block = (seen.first_chunk + number) * copies.blocks_per_chunk
        score_chunk(chunk_ref, queries_ref, scores_ref, first_block, block_size=copies.block_size)

    lax.fori_loop(0, seen.num_chunks, score, None)

    @pl.when(step + 1 < pl.num_programs(1))
    def _():
        copies.start_first(following)
