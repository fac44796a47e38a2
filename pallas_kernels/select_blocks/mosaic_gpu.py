"""`select_blocks` on Hopper: block scores at matrix-product speed, then an exact top-k.

Queries go in chunks, so that the scores of all blocks fit into memory beside the model's arrays.
With many blocks the top-k has two levels: the K best groups of blocks by their maxima hold the K
best blocks, ties included, so that only the blocks of those groups are looked at one by one.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import current_target
from pallas_kernels.select_blocks.quantization import quantize_keys, quantize_queries
from pallas_kernels.select_blocks.scores_mosaic_gpu import (
    GROUP,
    Documents,
    Scales,
    ScoreConfig,
    ScoreOptions,
    block_scores,
)
from pallas_kernels.select_blocks.top_k_mosaic_gpu import MAX_TOP_K, TopKConfig, top_ids
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.tuning import shape_bucket, tuned
from pallas_kernels.visibility import document_starts, query_slots, segments_at

MIN_QUERIES = 64
SIZES = (64, 128)
# Thread blocks that run at once on an H100: chunks of whole waves leave no core idle at their end.
NUM_CORES = 132


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How the selection is cut up.

    Attributes:
      scores: tiles of the score kernel.
      top_k: tiles of the top-k kernel, not larger than those of the scores.
      score_bytes: memory for the scores of a chunk of queries, over batch, heads and blocks.
      min_blocks_of_two_levels: from that many key blocks on the top-k has two levels.
    """

    scores: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    top_k: TopKConfig = dataclasses.field(default_factory=TopKConfig)
    score_bytes: int = 4_500_000_000
    min_blocks_of_two_levels: int = 2048

    def __post_init__(self):
        if self.scores.tile % self.top_k.tile:
            raise ValueError(
                f"top_k.tile={self.top_k.tile} must divide scores.tile={self.scores.tile}: what a "
                "score tile does not see is not written"
            )
        if self.score_bytes < 1:
            raise ValueError(f"score_bytes={self.score_bytes}: must be >= 1")

    def chunk(self, num_queries: int, heads: int, num_blocks: int) -> int:
        """Queries per chunk: what `score_bytes` holds, in whole tiles and whole waves of them.

        Args:
          num_queries: of the padded sequence.
          heads: batch rows times index heads.
          num_blocks: N.
        """
        tile = self.scores.tile
        tiles = max(1, self.score_bytes // (4 * heads * num_blocks * tile))
        wave = NUM_CORES // math.gcd(NUM_CORES, heads)
        if tiles > wave:
            tiles -= tiles % wave
        return min(num_queries, tiles * tile)


@in_32_bits
def select_blocks(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
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
    config: SelectConfig | None = None,
) -> Int[Array, "B Hkv T K"]:
    """The ids of the K best blocks per query and group, ascending, then -1.

    Raises:
      NotImplementedError: what these kernels do not serve, with the reason.
    """
    current_target()
    refuse_varying(index_q, index_k, segment_ids, query_offset)
    _refuse(index_q, block_size, top_k, pooling, scale, index_precision)
    config = config or _tuned(index_q, block_size, index_precision)
    num_queries, tile = index_q.shape[1], config.scores.tile
    index_q, index_k = _padded(index_q, tile), _padded(index_k, block_size)
    scales = None
    if index_precision == "int8":
        index_q, query_scales = quantize_queries(index_q)
        index_k, key_scales = quantize_keys(index_k, block_size)
        scales = Scales(query_scales.swapaxes(1, 2), key_scales)
    batch, padded_queries, num_heads, _ = index_q.shape
    num_blocks = index_k.shape[1] // block_size
    places = _places(
        segment_ids, query_offset, batch, num_queries, padded_queries, num_blocks, block_size
    )
    options = ScoreOptions(
        block_size,
        scale,
        num_local_blocks,
        num_sink_blocks,
        groups=num_blocks >= config.min_blocks_of_two_levels,
    )
    chunk = config.chunk(padded_queries, batch * num_heads, num_blocks)

    def select(first_query, size):
        scores, groups = block_scores(
            index_q,
            index_k,
            places.query_offset,
            first_query,
            places.documents(tile),
            scales,
            num_queries=size,
            options=options,
            config=config.scores,
        )
        place = places.chunk(first_query, size)
        return _choose(scores, groups, place, top_k, config.top_k).swapaxes(2, 3)

    # The odd chunk comes first, where queries see least: at the end it would cost a whole wave of
    # the longest tiles, however few queries it has.
    count, odd = divmod(padded_queries, chunk)
    parts = [select(jnp.int32(0), odd)] if odd else []
    if count:
        starts = odd + chunk * jnp.arange(count, dtype=jnp.int32)
        ids = jnp.moveaxis(lax.map(functools.partial(select, size=chunk), starts), 0, 2)
        parts.append(ids.reshape(batch, num_heads, -1, top_k))
    return jnp.concatenate(parts, axis=2)[:, :, :num_queries]


def _refuse(index_q, block_size, top_k, pooling, scale, index_precision) -> None:
    """Raises NotImplementedError with the first reason that these kernels cannot serve a call."""
    index_dim = index_q.shape[3]
    served = {
        f"pooling={pooling!r}: the kernel takes maxima": pooling == "max",
        f"block_size={block_size}: the kernel's tiles are {SIZES}": block_size in SIZES,
        f"index_dim={index_dim}: the kernel's tiles are {SIZES}": index_dim in SIZES,
        f"top_k={top_k}: the kernel's lists hold {MAX_TOP_K} blocks": top_k <= MAX_TOP_K,
        f"scale={scale}: the kernel multiplies the maxima, which needs a positive one": scale > 0,
        f"{index_q.dtype} index queries: the kernel takes bfloat16, float16 or 8-bit ones": (
            index_q.dtype in (jnp.bfloat16, jnp.float16)
            or (index_precision == "int8" and index_q.dtype == jnp.float32)
        ),
        f"decoding: {index_q.shape[1]} queries do not fill a tile of {MIN_QUERIES}": (
            index_q.shape[1] >= MIN_QUERIES
        ),
    }
    for reason, holds in served.items():
        if not holds:
            raise NotImplementedError(reason)


def _tuned(index_q, block_size: int, index_precision: str) -> SelectConfig:
    """The tuned tile sizes of both kernels."""
    num_queries, _, index_dim = index_q.shape[1:]
    bucket = shape_bucket(num_queries, Di=index_dim, Bk=block_size)
    dtype = index_q.dtype.name if index_precision == "native" else index_precision
    return SelectConfig(
        scores=tuned("select_blocks.scores", ScoreConfig(), dtype=dtype, bucket=bucket),
        top_k=tuned("select_blocks.top_k", TopKConfig(), dtype=dtype, bucket=bucket),
    )


def _padded(array: Array, multiple: int) -> Array:
    """Zeros behind axis 1 up to a multiple."""
    padding = -array.shape[1] % multiple
    if padding == 0:
        return array
    return jnp.pad(array, [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2))


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where queries lie among the blocks.

    Attributes:
      query_offset: [B].
      own: each query's own block, -1 for padding, [B, T].
      first: the first block of its document, N for padding, [B, T]; None without segments.
    """

    query_offset: Int[Array, "B"]
    own: Int[Array, "B T"]
    first: Int[Array, "B T"] | None

    def documents(self, tile: int) -> Documents | None:
        """For the score kernel."""
        if self.first is None:
            return None
        return Documents(self.first, self.first.reshape(len(self.first), -1, tile).min(-1))

    def chunk(self, start: Int[Array, ""], size: int) -> "_Places":
        """Those of `size` queries from `start` on."""

        def cut(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size, axis=1)

        first = None if self.first is None else cut(self.first)
        return _Places(self.query_offset, cut(self.own), first)

    def ranges(self, tile: int) -> tuple[Int[Array, "B tiles"], Int[Array, "B tiles"]]:
        """The past blocks that any query of a tile sees: first, and end."""
        by_tile = (len(self.own), -1, tile)
        end = jnp.maximum(self.own.reshape(by_tile).max(-1), 0)
        if self.first is None:
            return jnp.zeros_like(end), end
        return jnp.minimum(self.first.reshape(by_tile).min(-1), end), end


def _places(
    segment_ids, query_offset, batch, num_queries, padded_queries, num_blocks, block_size
) -> _Places:
    offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    slots = query_slots(batch, padded_queries, offset)
    own = jnp.minimum(slots // block_size, num_blocks - 1)
    real = jnp.arange(padded_queries) < num_queries
    if segment_ids is None:
        return _Places(offset, jnp.where(real, own, -1), None)
    real &= segments_at(segment_ids, slots) > 0
    first = segments_at(document_starts(segment_ids), slots) // block_size
    return _Places(offset, jnp.where(real, own, -1), jnp.where(real, first, num_blocks))


def _choose(
    scores: Float[Array, "B Hkv N C"],
    groups: Float[Array, "B Hkv M C"] | None,
    place: _Places,
    top_k: int,
    config: TopKConfig,
) -> Int[Array, "B Hkv K C"]:
    """The best blocks of a chunk; by way of the best groups where their maxima are given."""
    first, end = place.ranges(config.tile)
    if groups is None:
        return top_ids(scores, place.own, first, end, top_k=top_k, config=config)
    first, end = first // GROUP, -(-end // GROUP)
    best = top_ids(groups, None, first, end, top_k=top_k, config=config)
    children = best[:, :, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)[:, None]
    seen = (best >= 0)[:, :, :, None] & (children < place.own[:, None, None, None])
    if place.first is not None:
        seen &= children >= place.first[:, None, None, None]
    shape = (*best.shape[:2], top_k * GROUP, best.shape[3])
    inside = jnp.clip(children, 0, scores.shape[2] - 1).reshape(shape)
    candidates = jnp.take_along_axis(scores, inside, axis=2)
    candidates = jnp.where(seen.reshape(shape), candidates, -jnp.inf)
    count = jnp.minimum(end - first, top_k) * GROUP
    return top_ids(
        candidates, place.own, jnp.zeros_like(count), count, best, top_k=top_k, config=config
    )
