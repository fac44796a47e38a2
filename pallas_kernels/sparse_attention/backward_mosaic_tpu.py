"""The backward pass of sparse attention on a TPU: tiles of queries, and two kernels over them."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_tpu import LANES, LOG2E, Target
from pallas_kernels.sparse_attention.forward_mosaic_tpu import TileConfig
from pallas_kernels.sparse_attention.key_value_gradient_mosaic_tpu import key_value_gradient
from pallas_kernels.sparse_attention.query_gradient_mosaic_tpu import (
    NUM_STATISTICS,
    query_gradient,
)
from pallas_kernels.sparse_attention.reverse_tiles import reverse_tiles
from pallas_kernels.sparse_attention.tile_lists import tile_lists

# Of the megabyte of scalar memory, what the numbers of all slices' owners may take.
_OWNER_BYTES = 2**19


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes of the backward pass.

    Attributes:
      queries: per tile; 8, 16 or 24.
      blocks_per_step: fetched at once for the gradient of queries.
      blocks_per_part: multiplied at once.
      tiles_per_step: fetched at once for the gradients of keys and values, of up to 128 rows; of
        larger tiles (many heads per group) fewer.
      tiles_per_part: multiplied at once, likewise.
      depth: steps in flight, a power of two.
      tiles_per_slice: of a block's tiles, what a program goes through; more for long sequences, of
        whose slices the scalar memory would not hold as many.
    """

    queries: int = 8
    blocks_per_step: int = 16
    blocks_per_part: int = 4
    tiles_per_step: int = 16
    tiles_per_part: int = 8
    depth: int = 4
    tiles_per_slice: int = 128

    def __post_init__(self):
        _ = self.tiles
        if self.tiles_per_part < 1 or self.tiles_per_step % self.tiles_per_part:
            raise ValueError(
                f"tiles_per_step={self.tiles_per_step}: must be a multiple of "
                f"tiles_per_part={self.tiles_per_part}, which must be >= 1"
            )
        if self.tiles_per_slice < 1:
            raise ValueError(f"tiles_per_slice={self.tiles_per_slice}: must be >= 1")

    def tiles_of(self, num_rows: int) -> tuple[int, int]:
        """Tiles per step and per part, if a tile has this many rows."""
        part = max(1, self.tiles_per_part * LANES // max(num_rows, LANES))
        return part * (self.tiles_per_step // self.tiles_per_part), part

    @property
    def tiles(self) -> TileConfig:
        """How tiles go through blocks."""
        return TileConfig(self.queries, self.blocks_per_step, self.blocks_per_part, self.depth)


def backward(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "pages Bk D"],
    v: Float[Array, "pages Bk D"],
    block_ids: Int[Array, "B Hkv T K"],
    offsets: Int[Array, "B"],
    lse: Float[Array, "B Hq T"],
    do: Float[Array, "B T Hq D"],
    delta: Float[Array, "B Hq T"],
    *,
    scale: float,
    config: BackwardConfig,
    target: Target,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "pages Bk D"], Float[Array, "pages Bk D"]]:
    """Gradients in q, k and v, of their dtypes; the same bits in every run.

    Args:
      q: queries.
      k: blocks of keys of one head each, by batch row, then head.
      v: their values.
      block_ids: distinct and visible ones per query, -1 anywhere for none.
      offsets: the key slot of the first query.
      lse: log-sum-exp of the scores, natural log; -inf where nothing is seen.
      do: gradient of the output, of q's dtype.
      delta: sum(o * do) less the gradient of the log-sum-exp.
      scale: of the scores, positive.
      config: tile sizes.
      target: what the kernels are traced for.
    """
    batch, num_queries, _, _ = q.shape
    groups, cores, queries = block_ids.shape[1], target.chip.num_cores, config.queries
    num_blocks, block_size = k.shape[0] // (batch * groups), k.shape[1]
    tiles = -(-num_queries // (queries * cores)) * cores
    lists = tile_lists(block_ids, offsets, queries=queries, num_tiles=tiles, num_blocks=num_blocks)
    q_tiles, do_tiles = (_tiles(array, groups, queries, tiles) for array in (q, do))
    statistics = _statistics(lse, delta, groups, queries, tiles)
    dq = query_gradient(
        q_tiles,
        k,
        v,
        do_tiles,
        statistics,
        lists,
        scale=scale,
        config=config.tiles,
        target=target,
    )
    slices = reverse_tiles(
        lists,
        queries=config.queries,
        tiles_per_group=tiles,
        tiles_per_row=tiles,
        num_blocks=num_blocks,
        block_size=block_size,
        tiles_per_slice=_slice_length(lists, k.shape[0], config.tiles_per_slice),
        cores=min(cores, k.shape[0]),
    )
    tiles_per_step, tiles_per_part = config.tiles_of(q_tiles.shape[1])
    dk, dv = key_value_gradient(
        q_tiles,
        k,
        v,
        do_tiles,
        statistics,
        slices,
        scale=scale,
        queries=queries,
        tiles_per_step=tiles_per_step,
        tiles_per_part=tiles_per_part,
        depth=config.depth,
        target=target,
    )
    return _from_tiles(dq, q.shape, groups, queries), dk, dv


def _slice_length(lists: Int[Array, "tiles 4 L"], num_pages: int, shortest: int) -> int:
    """Tiles per slice: so many that the owners of all slices fit into scalar memory."""
    entries, length = lists.shape[0] * lists.shape[2], shortest
    while 4 * (entries // length + num_pages) > _OWNER_BYTES and length < entries:
        length *= 2
    return length


def _tiles(
    array: Float[Array, "B T Hq D"], groups: int, queries: int, tiles: int
) -> Float[Array, "tiles rows D"]:
    """Tiles of each group's queries, rows (head, query); zeros behind the last query."""
    batch, num_queries, heads, head_dim = array.shape
    missing = tiles * queries - num_queries
    array = jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0)))
    array = array.reshape(batch, tiles, queries, groups, heads // groups, head_dim)
    return array.transpose(0, 3, 1, 4, 2, 5).reshape(batch * groups * tiles, -1, head_dim)


def _from_tiles(
    array: Float[Array, "tiles rows D"], shape: tuple[int, ...], groups: int, queries: int
) -> Float[Array, "B T Hq D"]:
    batch, num_queries, heads, head_dim = shape
    array = array.reshape(batch, groups, -1, heads // groups, queries, head_dim)
    array = array.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, head_dim)
    return array[:, :num_queries]


def _statistics(
    lse: Float[Array, "B Hq T"],
    delta: Float[Array, "B Hq T"],
    groups: int,
    queries: int,
    tiles: int,
) -> Float[Array, "tiles 8 lanes"]:
    """What belongs to the rows of each tile, along lanes and in whole registers."""
    # A row that sees nothing has no weights to scale.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, 0)
    rows = jnp.stack((lse, delta), 1)
    batch, kinds, heads, num_queries = rows.shape
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, tiles * queries - num_queries)))
    rows = rows.reshape(batch, kinds, groups, heads // groups, tiles, queries)
    rows = rows.transpose(0, 2, 4, 1, 3, 5).reshape(batch * groups * tiles, kinds, -1)
    lanes = -rows.shape[2] % LANES
    return jnp.pad(rows, ((0, 0), (0, NUM_STATISTICS - kinds), (0, lanes)))
