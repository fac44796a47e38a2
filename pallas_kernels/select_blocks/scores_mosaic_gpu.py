"""Block scores on Hopper at matrix-product speed: the maxima of index scores, block by block.

A thread block takes one index head and a tile of neighbouring queries, half of it per consumer
warpgroup, and streams the past key blocks through a ring in shared memory. The score matrix of a
step stays in registers; only its row maxima leave. Only strictly past blocks are scored: they are
wholly visible, so no token is masked, and a query's own block is always selected anyway.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.mosaic_gpu import (
    ROWS,
    SHARED_MEMORY_BYTES,
    current_target,
    full_rows,
    matmul,
    run_roles,
)

# Blocks per group of the two-level selection.
GROUP = 16


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Tile sizes of the score kernel.

    Attributes:
      queries_per_warpgroup: rows of one matrix product, 64 or 128.
      num_consumers: warpgroups that compute; each key block loaded serves all of them.
      num_stages: key blocks in the ring.
    """

    queries_per_warpgroup: int = 128
    num_consumers: int = 2
    num_stages: int = 4

    def __post_init__(self):
        if self.queries_per_warpgroup not in (64, 128):
            raise ValueError(
                f"queries_per_warpgroup={self.queries_per_warpgroup}: the matrix unit takes 64 "
                "rows at a time and registers hold two of those, choose 64 or 128"
            )
        if self.num_consumers not in (1, 2):
            raise ValueError(
                f"num_consumers={self.num_consumers}: choose 1 or 2, more have too few registers"
            )
        if self.num_stages < 2:
            raise ValueError(
                f"num_stages={self.num_stages}: choose at least 2, or copies wait for products"
            )

    @property
    def tile(self) -> int:
        """Queries per thread block."""
        return self.queries_per_warpgroup * self.num_consumers

    def check_shared_memory(self, block_size: int, index_dim: int, itemsize: int) -> None:
        """Raises ValueError if the tiles take more shared memory than a thread block has."""
        operands = (self.tile + self.num_stages * block_size) * index_dim * itemsize
        used = operands + self.tile * 3 * 4 + 1024  # maxima; barriers and alignment
        if used > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"num_stages={self.num_stages} with tiles of {self.tile} queries needs {used} "
                f"bytes of shared memory, there are {SHARED_MEMORY_BYTES}; take fewer stages"
            )


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What is scored, and how forced blocks are marked.

    Attributes:
      block_size: Bk.
      scale: of the scores, > 0, so that it may follow the maximum.
      num_local_blocks: the own block and those before it; the latter score +inf.
      num_sink_blocks: leading blocks of the document, which score +inf.
      groups: also return the maxima over `GROUP` consecutive blocks.
    """

    block_size: int
    scale: float
    num_local_blocks: int = 1
    num_sink_blocks: int = 0
    groups: bool = False

    @property
    def marks_forced(self) -> bool:
        """Whether blocks other than the own one are forced."""
        return self.num_local_blocks > 1 or self.num_sink_blocks > 0


@dataclasses.dataclass(frozen=True)
class Documents:
    """Where documents begin, in blocks; a padding query's first block is beyond all blocks.

    Attributes:
      first: each query's first block, int32 [B, T].
      earliest: the first block that any query of a tile sees, int32 [B, T / tile].
    """

    first: Int[Array, "B T"]
    earliest: Int[Array, "B tiles"]


@dataclasses.dataclass(frozen=True)
class Scales:
    """Factors of 8-bit queries and keys, positive float32.

    Attributes:
      query: [B, Hkv, T].
      key: one per block, [B, N].
    """

    query: Float[Array, "B Hkv T"]
    key: Float[Array, "B N"]


def block_scores(
    index_q: Shaped[Array, "B T Hkv Di"],
    index_k: Shaped[Array, "B S Di"],
    query_offset: Int[Array, "B"],
    first_query: Int[Array, ""],
    documents: Documents | None,
    scales: Scales | None,
    *,
    num_queries: int,
    options: ScoreOptions,
    config: ScoreConfig,
) -> tuple[Float[Array, "B Hkv N C"], Float[Array, "B Hkv groups C"] | None]:
    """Scores of all past blocks for a chunk of queries.

    A score is the maximum over the block's tokens of index_q . index_k, times `options.scale`. It
    is -inf for a block before the query's document, from its own block on, or with a NaN in it, and
    +inf for a forced block; where blocks are forced, an overflow stays below them.

    Args:
      index_q: queries; T a multiple of the tile.
      index_k: keys, S a multiple of the block size.
      query_offset: key slot of query 0.
      first_query: where the chunk starts, a multiple of the tile.
      documents: None for one document per row.
      scales: of int8 inputs; None for bf16 and f16 ones.
      num_queries: C, the chunk's length, a multiple of the tile; queries beyond T are not scored.
      options: see `ScoreOptions`.
      config: tile sizes.

    Returns:
      float32 scores, and with `options.groups` the maxima over groups of blocks. What no query of a
      tile can see, past it or before its documents, is not written.
    """
    batch, _, num_heads, index_dim = index_q.shape
    num_blocks = index_k.shape[1] // options.block_size
    config.check_shared_memory(options.block_size, index_dim, index_q.dtype.itemsize)
    shapes = [(batch, num_heads, num_blocks, num_queries)]
    if options.groups:
        shapes.append((batch, num_heads, pl.cdiv(num_blocks, GROUP), num_queries))
    optional = {
        "documents": () if documents is None else (documents.first, documents.earliest),
        "scales": () if scales is None else (scales.query, scales.key),
    }
    body = functools.partial(
        _score_tile,
        has_documents=documents is not None,
        has_scales=scales is not None,
        options=options,
        config=config,
    )
    rows, transforms = config.queries_per_warpgroup, _operand_layout(index_dim, index_q.dtype)
    outputs = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        grid=(num_queries // config.tile, batch, num_heads),
        grid_names=("tile", "row", "head"),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        scratch_types={
            "q_smem": plgpu.SMEM(
                (config.num_consumers, rows, index_dim), index_q.dtype, transforms=transforms
            ),
            "k_smem": plgpu.SMEM(
                (config.num_stages, options.block_size, index_dim),
                index_k.dtype,
                transforms=transforms,
            ),
            "maxima_smem": plgpu.SMEM((config.num_consumers, 3, rows), jnp.float32),
            "q_arrived": plgpu.Barrier(num_barriers=config.num_consumers),
            "k_arrived": plgpu.Barrier(num_barriers=config.num_stages),
            "k_consumed": plgpu.Barrier(
                num_arrivals=config.num_consumers, num_barriers=config.num_stages
            ),
        },
        interpret=current_target().interpret,
        kernel_name="block_scores",
    )(
        index_q,
        index_k,
        query_offset,
        first_query.reshape(1),
        *optional["documents"],
        *optional["scales"],
    )
    return outputs if options.groups else (outputs[0], None)


def _operand_layout(index_dim: int, dtype) -> tuple:
    """Rows of at most 128 bytes, swizzled."""
    row_bytes = min(128, index_dim * jnp.dtype(dtype).itemsize)
    return (
        plgpu.TilingTransform((8, row_bytes // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(row_bytes),
    )


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A thread block's place: its first query in the arrays and in the chunk, and its blocks."""

    row: jax.Array
    head: jax.Array
    query: jax.Array
    chunk_query: jax.Array
    slot: jax.Array
    first_block: jax.Array
    end_block: jax.Array


def _score_tile(
    *refs, q_smem, k_smem, maxima_smem, q_arrived, k_arrived, k_consumed, has_documents, has_scales,
    options, config,
):  # fmt: skip
    """One thread block: roles and the ring."""
    q_ref, k_ref, offset_ref, chunk_ref, *rest = refs
    documents_refs = rest[:2] if has_documents else None
    rest = rest[2:] if has_documents else rest
    scale_refs = rest[:2] if has_scales else None
    outputs = rest[2:] if has_scales else rest
    tile = _place(q_ref, k_ref, offset_ref, chunk_ref, documents_refs, options, config)

    def consume(warpgroup):
        _consume(
            tile, warpgroup, q_ref, documents_refs, scale_refs, outputs, q_smem.at[warpgroup],
            k_smem, maxima_smem.at[warpgroup], q_arrived.at[warpgroup], k_arrived, k_consumed,
            options, config,
        )  # fmt: skip

    def produce():
        _produce(tile, k_ref, k_smem, k_arrived, k_consumed, options.block_size, config.num_stages)

    run_roles(config.num_consumers, consume, produce)


def _produce(tile, k_ref, k_smem, k_arrived, k_consumed, block_size, num_stages):
    """Keeps the ring of key blocks full."""
    num_steps = jnp.maximum(tile.end_block - tile.first_block, 0)

    @pl.loop(0, num_steps)
    def _(step):
        stage = lax.rem(step, num_stages)

        @pl.when(step >= num_stages)
        def _():
            plgpu.barrier_wait(k_consumed.at[stage])

        start = (tile.first_block + step) * block_size
        plgpu.copy_gmem_to_smem(
            k_ref.at[tile.row, pl.ds(start, block_size)], k_smem.at[stage], k_arrived.at[stage]
        )

    @pl.loop(jnp.maximum(num_steps - num_stages, 0), num_steps)
    def _(step):  # every arrival must be waited for before the block ends
        plgpu.barrier_wait(k_consumed.at[lax.rem(step, num_stages)])


def _place(q_ref, k_ref, offset_ref, chunk_ref, documents_refs, options, config) -> _Tile:
    """Which queries and blocks this thread block scores; late tiles, the heaviest, come first."""
    row, head = lax.axis_index("row"), lax.axis_index("head")
    chunk_tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")
    chunk_query = chunk_tile * config.tile
    query = chunk_ref[0] + chunk_query
    num_queries, num_blocks = q_ref.shape[1], k_ref.shape[1] // options.block_size
    exists = query < num_queries
    query = jnp.minimum(query, num_queries - config.tile)
    slot = offset_ref[row] + query
    # Up to the own block of the last query, which is not scored.
    end = jnp.minimum(lax.div(slot + config.tile - 1, options.block_size), num_blocks)
    first = jnp.int32(0) if documents_refs is None else documents_refs[1][row, query // config.tile]
    return _Tile(row, head, query, chunk_query, slot, first, jnp.where(exists, end, 0))


def _consume(
    tile, warpgroup, q_ref, documents_refs, scale_refs, outputs, q_smem, k_smem, maxima_smem,
    q_arrived, k_arrived, k_consumed, options, config,
):  # fmt: skip
    """A consumer warpgroup: its rows against every block of the tile."""
    rows = config.queries_per_warpgroup
    offset = warpgroup * rows
    query = pl.multiple_of(tile.query + offset, rows)
    plgpu.copy_gmem_to_smem(q_ref.at[tile.row, pl.ds(query, rows), tile.head], q_smem, q_arrived)
    plgpu.barrier_wait(q_arrived)
    columns = pl.ds(pl.multiple_of(tile.chunk_query + offset, rows), rows)
    own = lax.div(_iota(rows) + (tile.slot + offset), options.block_size)
    first = (
        None if documents_refs is None else _load_rows(documents_refs[0], (tile.row, query), rows)
    )
    factor = None
    if scale_refs is not None:
        factor = _load_rows(scale_refs[0], (tile.row, tile.head, query), rows)

    def step(block, group_maximum):
        stage = lax.rem(block - tile.first_block, config.num_stages)
        key_scale = None if scale_refs is None else scale_refs[1][tile.row, block]
        plgpu.barrier_wait(k_arrived.at[stage])
        integer = jnp.issubdtype(k_smem.dtype, jnp.integer)
        scores = matmul(
            q_smem,
            k_smem.at[stage].transpose((1, 0)),
            (rows, options.block_size),
            jnp.int32 if integer else jnp.float32,
        )
        plgpu.barrier_arrive(k_consumed.at[stage])
        maximum = _row_maxima(scores)
        if key_scale is not None:
            maximum = maximum * key_scale * factor
        maximum = _mark(maximum * options.scale, block, own, first, options)
        slot = lax.rem(block, 2)
        _store(maximum, maxima_smem.at[slot], outputs[0].at[tile.row, tile.head, block, columns])
        return jnp.maximum(group_maximum, maximum) if options.groups else None

    if options.groups:

        @pl.loop(lax.div(tile.first_block, GROUP), pl.cdiv(tile.end_block, GROUP))
        def _(group):
            start = jnp.maximum(tile.first_block, group * GROUP)
            end = jnp.minimum(tile.end_block, (group + 1) * GROUP)
            maximum = lax.fori_loop(start, end, step, full_rows(rows, -jnp.inf))
            target = outputs[1].at[tile.row, tile.head, group, columns]
            _store(maximum, maxima_smem.at[2], target)
    else:
        lax.fori_loop(tile.first_block, tile.end_block, step, None)
    plgpu.wait_smem_to_gmem(0)


def _row_maxima(scores):
    """float32 maxima; NaN where there is one, as a Hopper GPU's maximum has it."""
    maxima = scores.max(axis=1).astype(jnp.float32)
    if current_target().interpret is not None and jnp.issubdtype(scores.dtype, jnp.floating):
        # A CPU's maximum drops NaN.
        maxima = jnp.where((scores != scores).any(axis=1), jnp.nan, maxima)
    return maxima


def _mark(score, block, own, first, options):
    """-inf for blocks that a row cannot choose, +inf for those that it must."""
    seen = block < own
    if first is not None:
        seen &= block >= first
    if options.marks_forced:
        forced = block > own - options.num_local_blocks
        sinks = options.num_sink_blocks
        forced |= block < (sinks if first is None else first + sinks)
        largest = float(jnp.finfo(jnp.float32).max)
        score = jnp.where(score > largest, largest, score)
        return jnp.where(
            seen & (forced | (score == score)), jnp.where(forced, jnp.inf, score), -jnp.inf
        )
    return jnp.where(seen & (score == score), score, -jnp.inf)


def _store(maximum, smem, gmem):
    """Starts a copy of one value per row; the copy before the last must be done by then."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    smem[...] = maximum
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)


def _iota(rows: int):
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROWS)


def _load_rows(ref, index, rows):
    """One value per row from device memory; `index` ends with the first of them."""
    return plgpu.load(ref.at[(*index[:-1], pl.ds(index[-1], rows))], layout=ROWS, optimized=False)
