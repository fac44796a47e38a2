"""`select_blocks` on TPU: what it serves, and how queries are cut into tiles.

One kernel keeps everything but the block ids in VMEM. A row is a query in one head, so that few
heads fill the lanes; neighbouring rows make a tile, and neighbouring tiles alternate between the
cores of a chip, which have about the same to do then.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.mosaic_tpu import LANES, SUBLANES, Chip, current_target
from pallas_kernels.select_blocks.quantization import quantize_keys, quantize_queries
from pallas_kernels.select_blocks.select_mosaic_tpu import (
    Keys,
    Options,
    SelectConfig,
    Tiles,
    select_tiles,
)
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.tuning import shape_bucket, tuned
from pallas_kernels.visibility import document_starts, query_slots, segments_at

MAX_TOP_K = 64
MAX_BLOCK_SIZE = 512
MAX_INDEX_DIM = 256
# Index dims are padded to multiples of it.
INDEX_DIMS = 64
# Of a lane in a tile of memory. Blocks of whole tiles are copied from where they are; others, which
# nobody uses at length, from a copy of the keys padded to whole chunks.
TILE_BYTES = 32
# The first block of a row that sees none.
_NEVER = 2**30


@in_32_bits
def select_blocks(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"] | Float[Array, "P Bk Di"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    top_k: int,
    num_local_blocks: int,
    num_sink_blocks: int,
    pooling: str,
    scale: float,
    index_precision: str = "native",
    page_table: Int[Array, "B N"] | None = None,
    config: SelectConfig | None = None,
) -> Int[Array, "B Hkv T K"]:
    """The ids of the K best blocks per query and group, ascending, then -1.

    With a `page_table`, index keys are pages of a block each, and it says which page holds a block.

    Raises:
      NotImplementedError: no TPU, or what the kernel does not serve, with the reason.
    """
    chip = current_target().chip
    refuse_varying(index_q, index_k, segment_ids, query_offset)
    _refuse(index_q, chip, block_size, top_k, pooling, scale, index_precision, page_table)
    config = config or _tuned(index_q, chip, block_size, index_precision)
    num_keys = index_k.shape[1] if page_table is None else page_table.shape[1] * block_size
    cut = _cut(index_q, num_keys, block_size, chip, config)
    batch, num_queries, num_heads, _ = index_q.shape
    own, first = _places(segment_ids, query_offset, index_q, num_keys, block_size)
    own = cut.tiles(jnp.repeat(own, num_heads, axis=1), -1)
    if first is not None:
        first = cut.tiles(jnp.repeat(first, num_heads, axis=1), _NEVER)
    query_scales = None
    if index_precision == "int8":
        index_q, query_scales = quantize_queries(index_q)
        query_scales = cut.tiles(query_scales.reshape(batch, -1))[:, None]
    index_q = _padded(index_q, -1, -index_q.shape[-1] % INDEX_DIMS)
    ids = select_tiles(
        Tiles(
            queries=cut.tiles(index_q.reshape(batch, num_queries * num_heads, -1)),
            own=own[:, None],
            first=None if first is None else first[:, None],
            ranges=cut.ranges(own, first)[:, None],
            query_scales=query_scales,
        ),
        _keys(index_k, page_table, cut, index_precision),
        options=Options(block_size, top_k, num_local_blocks, num_sink_blocks, float(scale)),
        config=config,
        chunk=cut.chunk,
        num_blocks=cut.num_blocks,
        tiles_per_row=cut.tiles_per_row,
    )
    ids = ids[: batch * cut.tiles_per_row].reshape(batch, cut.tiles_per_row, top_k, cut.rows)
    ids = ids.swapaxes(2, 3).reshape(batch, -1, top_k)[:, : num_queries * num_heads]
    return ids.reshape(batch, num_queries, num_heads, top_k).swapaxes(1, 2)


def _keys(index_k, page_table, cut: "_Cut", index_precision: str) -> Keys:
    """The keys as the kernel takes them."""
    scales = None
    if index_precision == "int8":
        index_k, scales = quantize_keys(index_k, cut.block_size)
        if page_table is not None:
            scales = jnp.take(scales[:, 0], page_table, mode="clip")
        scales = _padded(scales, 1, cut.num_blocks - scales.shape[1])[..., None]
    index_k = _padded(index_k, -1, -index_k.shape[-1] % INDEX_DIMS)
    if page_table is not None:
        # A block behind those in use has any page, or none.
        pages = jnp.clip(page_table.astype(jnp.int32), 0, index_k.shape[0] - 1)
        return Keys(index_k, scales, _padded(pages, 1, cut.num_blocks - pages.shape[1])[:, None])
    if cut.block_size * index_k.dtype.itemsize % TILE_BYTES:
        index_k = _padded(index_k, 1, -index_k.shape[1] % cut.chunk)
    return Keys(index_k, scales, None)


def _refuse(index_q, chip, block_size, top_k, pooling, scale, index_precision, page_table) -> None:
    """Raises NotImplementedError with the first reason that the kernel cannot serve a call."""
    integers = index_precision == "int8"
    index_dim = index_q.shape[3]
    bytes_per_element = 1 if integers else index_q.dtype.itemsize
    served = {
        f"pooling={pooling!r}: the kernel takes maxima": pooling == "max",
        f"{index_q.dtype} index queries: the kernel takes bfloat16 and float32": (
            index_q.dtype in (jnp.bfloat16, jnp.float32)
        ),
        f"index_precision='int8': the MXU of a {chip.name} has no 8-bit integers": (
            not integers or chip.int8_ops > 0
        ),
        f"pages of {block_size} keys: the kernel copies them as whole tiles of memory": (
            page_table is None or block_size * bytes_per_element % TILE_BYTES == 0
        ),
        f"index_dim={index_dim}: the kernel takes up to {MAX_INDEX_DIM}": (
            index_dim <= MAX_INDEX_DIM
        ),
        f"block_size={block_size}: the kernel takes multiples of {SUBLANES} up to "
        f"{MAX_BLOCK_SIZE}": block_size <= MAX_BLOCK_SIZE and block_size % SUBLANES == 0,
        f"top_k={top_k}: the kernel takes {MAX_TOP_K} rounds at most": top_k <= MAX_TOP_K,
        f"scale={scale}: the kernel multiplies the maxima, which needs a positive one": scale > 0,
    }
    for reason, holds in served.items():
        if not holds:
            raise NotImplementedError(reason)


def _tuned(index_q, chip: Chip, block_size: int, index_precision: str) -> SelectConfig:
    """The tuned tile sizes."""
    num_queries, _, index_dim = index_q.shape[1:]
    return tuned(
        "select_blocks.mosaic_tpu",
        SelectConfig(),
        device_kind=chip.device_kind,
        dtype=index_q.dtype.name if index_precision == "native" else index_precision,
        bucket=shape_bucket(num_queries, Di=index_dim, Bk=block_size),
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How rows and keys are cut up.

    Attributes:
      rows: of a tile.
      tiles_per_row: tiles of one batch row.
      cores: the number of tiles is a multiple of it.
      block_size: Bk.
      chunk: keys per copy.
      num_blocks: for which a tile has scores, those behind the last key included.
    """

    rows: int
    tiles_per_row: int
    cores: int
    block_size: int
    chunk: int
    num_blocks: int

    def tiles(self, array: Shaped[Array, "B R *rest"], fill=0) -> Shaped[Array, "tiles rows *rest"]:
        """Cuts up what there is one of per row; `fill` for rows that there are not."""
        behind = self.tiles_per_row * self.rows - array.shape[1]
        array = _padded(array, 1, behind, fill).reshape(-1, self.rows, *array.shape[2:])
        return _padded(array, 0, -len(array) % self.cores, fill)

    def ranges(self, own: Int[Array, "tiles rows"], first: Int[Array, "tiles rows"] | None):
        """`select_tiles`'s ranges [tiles, 4]."""
        last = own.max(1)
        first = 0 * last if first is None else jnp.minimum(first.min(1), jnp.maximum(last, 0))
        # Past blocks only: the own one needs no score, but is a candidate.
        first_chunk = first * self.block_size // self.chunk
        end_chunk = -(-last * self.block_size // self.chunk)
        return jnp.stack(
            [
                first_chunk,
                jnp.maximum(end_chunk - first_chunk, 0),
                first // SUBLANES,
                last // SUBLANES + 1,
            ],
            axis=1,
        )


def _cut(index_q, num_keys: int, block_size: int, chip: Chip, config: SelectConfig) -> _Cut:
    """Tiles as large as the rows and the memory for scores allow."""
    num_rows = index_q.shape[1] * index_q.shape[2]
    blocks = -(-num_keys // block_size)
    groups = -(-blocks // SUBLANES)
    # The top-k reads a few groups more than there are.
    most = config.score_bytes // (4 * SUBLANES * (groups + config.unroll)) // LANES * LANES
    if most == 0:
        raise NotImplementedError(
            f"{num_keys} keys in blocks of {block_size}: the scores of {LANES} rows take more than "
            f"score_bytes={config.score_bytes}"
        )
    rows = min(config.rows, most, -(-num_rows // LANES) * LANES)
    groups_per_chunk = min(groups, max(1, config.products // (rows * SUBLANES * block_size)))
    scored = -(-groups // groups_per_chunk) * groups_per_chunk
    num_blocks = SUBLANES * max(scored, groups + config.unroll - 1)
    chunk = groups_per_chunk * SUBLANES * block_size
    tiles_per_row = -(-num_rows // rows)
    return _Cut(rows, tiles_per_row, chip.num_cores, block_size, chunk, num_blocks)


def _places(segment_ids, query_offset, index_q, num_keys: int, block_size: int):
    """Each query's own block, -1 for padding, and the first of its document (None: 0), [B, T]."""
    batch, num_queries = index_q.shape[:2]
    slots = query_slots(batch, num_queries, query_offset)
    own = jnp.minimum(slots, num_keys - 1) // block_size
    if segment_ids is None:
        return own, None
    real = segments_at(segment_ids, slots) > 0
    first = segments_at(document_starts(segment_ids), slots) // block_size
    return jnp.where(real, own, -1), jnp.where(real, first, _NEVER)


def _padded(array: Array, axis: int, behind: int, fill=0) -> Array:
    """`fill` behind an axis."""
    if behind == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, behind)
    return jnp.pad(array, widths, constant_values=fill)
