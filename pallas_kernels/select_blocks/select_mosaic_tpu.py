"""The selection kernel on TPU: scores, exact top-k and the ascending order of one tile at a time.

A *row* is a query in one head; a *tile* is a number of neighbouring rows of one batch row. Nothing
but block ids leaves the kernel. Keys are copied by hand, since how many a tile sees is known only
when it runs: a grid step for each chunk of them would pay for those that no query sees.
"""

import dataclasses
import functools

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


@dataclasses.dataclass(frozen=True)
class Scales:
    """Of 8-bit queries, [tiles, 1, rows], and of key blocks, [B, blocks, 1]."""

    queries: Float[Array, "tiles 1 rows"]
    keys: Float[Array, "B blocks 1"]


def select_tiles(
    queries: Shaped[Array, "tiles rows Di"],
    keys: Shaped[Array, "B S Di"],
    own: Int[Array, "tiles 1 rows"],
    first: Int[Array, "tiles 1 rows"],
    ranges: Int[Array, "tiles 1 4"],
    scales: Scales | None,
    *,
    options: Options,
    config: SelectConfig,
    chunk: int,
    num_blocks: int,
    tiles_per_row: int,
) -> Int[Array, "tiles K rows"]:
    """The ids of the K best blocks of each row, ascending, then -1.

    Args:
      queries: tiles of rows, those of a batch row together; as many tiles for each of the chip's
        cores, the last one empty if need be.
      keys: stay in HBM.
      own: the row's own block, -1 for a row that selects nothing.
      first: the first block that it sees.
      ranges: per tile the first chunk of keys, the number of chunks, and first and end of the
        groups of 8 blocks that its rows see.
      scales: of 8-bit queries and keys.
      options: the op's.
      config: ring and unrolling.
      chunk: keys per copy, a multiple of 8 blocks.
      num_blocks: a multiple of 8 that holds every chunk and `config.unroll - 1` groups more.
      tiles_per_row: tiles of one batch row.
    """
    target = current_target()
    cores = target.chip.num_cores
    tiles, rows, index_dim = queries.shape

    def of_tile(*shape, **memory):
        """One tile's block of an array: neighbouring ones alternate between the cores."""
        return pl.BlockSpec((1, *shape), lambda core, step: (step * cores + core, 0, 0), **memory)

    def next_range(core, step):
        return jnp.minimum((step + 1) * cores + core, tiles - 1), 0, 0

    smem = pltpu.SMEM
    in_specs = [
        of_tile(1, 4, memory_space=smem),
        pl.BlockSpec((1, 1, 4), next_range, memory_space=smem),
        of_tile(rows, index_dim),
        pl.BlockSpec(memory_space=pl.ANY),
        of_tile(1, rows),
        of_tile(1, rows),
    ]
    arguments = [ranges, ranges, queries, keys, own, first]
    if scales is not None:
        last = keys.shape[0] - 1

        def by_row(core, step):
            return jnp.minimum((step * cores + core) // tiles_per_row, last), 0, 0

        in_specs += [of_tile(1, rows), pl.BlockSpec((1, num_blocks, 1), by_row)]
        arguments += [scales.queries, scales.keys]
    return pl.pallas_call(
        functools.partial(
            _select_tile,
            options=options,
            unroll=config.unroll,
            tiles_per_row=tiles_per_row,
            cores=cores,
        ),
        grid=(cores, tiles // cores),
        in_specs=in_specs,
        out_specs=of_tile(options.top_k, rows),
        out_shape=jax.ShapeDtypeStruct((tiles, options.top_k, rows), jnp.int32),
        scratch_shapes=[
            pltpu.VMEM((index_dim, rows), queries.dtype),
            pltpu.VMEM((num_blocks, rows), jnp.float32),
            pltpu.VMEM((options.top_k, rows), jnp.int32),
            pltpu.VMEM((config.slots, chunk, index_dim), keys.dtype),
            pltpu.SemaphoreType.DMA((config.slots,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=target.chip.vmem_bytes * 7 // 8,
        ),
        interpret=target.interpret,
        name="select_blocks",
    )(*arguments)


def _select_tile(
    range_ref,
    next_ref,
    q_ref,
    keys_ref,
    own_ref,
    first_ref,
    *rest,
    options,
    unroll,
    tiles_per_row,
    cores,
):
    """One tile: all scores that it sees, then the top-k, while the next tile's keys arrive."""
    *scales, ids_ref, queries_ref, scores_ref, chosen_ref, buffers_ref, semaphores = rest
    query_scales, key_scales = scales or (None, None)
    step = pl.program_id(1)
    tile = step * cores + pl.program_id(0)
    row, next_row = lax.div(tile, tiles_per_row), lax.div(tile + cores, tiles_per_row)
    copies = KeyCopies(keys_ref, buffers_ref, semaphores, options.block_size)
    first_chunk, num_chunks = range_ref[0, 0, FIRST_CHUNK], range_ref[0, 0, NUM_CHUNKS]

    @pl.when(step == 0)
    def _():
        copies.start_first(row, first_chunk, num_chunks)

    queries_ref[...] = q_ref[0].T
    blocks = buffers_ref.shape[1] // options.block_size

    def score(number, _):
        copies.start(row, first_chunk, number + copies.slots - 1, num_chunks)
        chunk = copies.wait(row, first_chunk, number)
        block = (first_chunk + number) * blocks
        score_chunk(chunk, queries_ref, scores_ref, block, block_size=options.block_size)

    lax.fori_loop(0, num_chunks, score, None)

    @pl.when(step + 1 < pl.num_programs(1))
    def _():
        copies.start_first(next_row, next_ref[0, 0, FIRST_CHUNK], next_ref[0, 0, NUM_CHUNKS])

    begin, end = range_ref[0, 0, FIRST_GROUP], range_ref[0, 0, END_GROUP]
    mark_candidates(
        scores_ref,
        own_ref[0],
        first_ref[0],
        begin,
        end,
        key_scales_ref=None if key_scales is None else key_scales.at[0],
        query_scales=None if query_scales is None else query_scales[0],
        scale=options.scale,
        num_local_blocks=options.num_local_blocks,
        num_sink_blocks=options.num_sink_blocks,
        unroll=unroll,
    )
    choose(scores_ref, chosen_ref, begin, end, unroll=unroll)
    write_ascending(chosen_ref, ids_ref.at[0])
