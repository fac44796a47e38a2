"""`index_kl` on NVIDIA Hopper: what its kernels serve, in which chunks they run, how they combine.

The forward pass computes the value and the student's log-sum-exp; the backward pass recomputes the
probabilities of teacher and student and is a gradient of index queries and keys alone. Both go in
chunks of queries, so that what the kernels write per query and block takes bounded room. Selected
blocks and the causal prefix differ in their tiles only.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.index_k_mosaic_gpu import IndexKConfig, index_k_gradient
from pallas_kernels.index_kl.tiles import TILE_QUERIES, Tiles, by_row, dense_tiles, selected_tiles
from pallas_kernels.index_kl.tiles_mosaic_gpu import (
    DIVERGENCE,
    LSE,
    MASS,
    NUM_TERMS,
    STEP_ROWS,
    TEACHER_SHIFT,
    Scales,
    TileConfig,
    TileInputs,
    block_terms,
    score_gradients,
)
from pallas_kernels.mosaic_gpu import current_target, in_32_bits, refuse_varying
from pallas_kernels.sparse_attention.mosaic_gpu import MIN_QUERIES, visible_block_ids
from pallas_kernels.sparse_attention.reverse_index import row_length

# The block size of the dense form, whose support has none of its own.
_DENSE_BLOCK = 128

# Blocks whose results XLA adds up while it gathers them; of more it would first make a copy.
_SUMMED_AT_A_TIME = 64

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class IndexKLConfig:
    """Shape of the kernels and of the chunks.

    Attributes:
      tiles: the kernels of teacher and student.
      index_k: the kernel that adds up the gradient of the index keys.
      chunk_bytes: of device memory that a chunk's results per query and block may take.
      queries_per_row: see `reverse_index.row_length`, which chooses it by default.
    """

    tiles: TileConfig = dataclasses.field(default_factory=TileConfig)
    index_k: IndexKConfig = dataclasses.field(default_factory=IndexKConfig)
    chunk_bytes: int = 2**31
    queries_per_row: int | None = None

    def __post_init__(self):
        if self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={self.chunk_bytes} must be positive")
        row = self.queries_per_row
        if row is not None and (row < TILE_QUERIES or row & (row - 1)):
            raise ValueError(f"queries_per_row={row} must be a power of two from {TILE_QUERIES} on")


class _Options(NamedTuple):
    """What is known while tracing; `query_offset` is None if it is an array."""

    block_size: int
    scale: float
    index_scale: float
    query_offset: int | None
    config: IndexKLConfig


def index_kl(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    block_ids: Int[Array, "B Hkv T K"] | None,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    main_lse: Float[Array, "B Hq T"] | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    config: IndexKLConfig | None = None,
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """KL(teacher || student) and the student's log-sum-exp per query and group, in nats.

    Args:
      q: bfloat16 or float16, at least 64 queries of head_dim 64 or 128, at most 64 per group.
      k: keys.
      index_q: index queries of 64 or 128 dims, in q's dtype.
      index_k: index keys.
      block_ids: up to 64 per query; None for the whole causal prefix.
      segment_ids: document of each key slot, 0 for padding; with block ids only.
      query_offset: the key slot of the first query, per row or for all.
      main_lse: natural log-sum-exp of the main scores over the same support.
      block_size: 64 or 128.
      scale: of the main scores.
      index_scale: of the index scores.
      config: the kernels' shape; None for the default.

    Raises:
      NotImplementedError: no Hopper GPU, or arguments other than the above.
    """
    current_target()
    refuse_varying(q, k, index_q, index_k, block_ids, segment_ids, query_offset, main_lse)
    _check_served(q, k, index_q, index_k, block_ids, segment_ids, main_lse, block_size)
    known = isinstance(query_offset, int)
    options = _Options(
        _DENSE_BLOCK if block_ids is None else block_size,
        scale,
        index_scale,
        query_offset if known else None,
        config or IndexKLConfig(),
    )
    place = block_ids, segment_ids, None if known else query_offset
    teacher = jax.lax.stop_gradient((q, k, main_lse))
    return _align(options, *teacher, index_q, index_k, *place)


def _check_served(q, k, index_q, index_k, block_ids, segment_ids, main_lse, block_size: int):
    """Raises NotImplementedError for what the kernels are not written for."""
    if main_lse is None:
        raise NotImplementedError("the kernels need main_lse, which attention returns")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or any(
        array.dtype != q.dtype for array in (k, index_q, index_k)
    ):
        raise NotImplementedError(
            "the kernels take q, k, index_q and index_k all in bfloat16 or all in float16, not "
            f"{q.dtype}, {k.dtype}, {index_q.dtype} and {index_k.dtype}"
        )
    for name, dim in (("head_dim", q.shape[3]), ("index dim", index_q.shape[3])):
        if dim not in (64, 128):
            raise NotImplementedError(f"the kernels take a {name} of 64 or 128, not {dim}")
    if q.shape[2] // k.shape[2] > STEP_ROWS:
        raise NotImplementedError(
            f"the kernels take at most 64 query heads per KV head, not {q.shape[2] // k.shape[2]}"
        )
    if q.shape[1] < MIN_QUERIES:
        raise NotImplementedError(
            f"{q.shape[1]} queries are decoding, the kernels are for {MIN_QUERIES} or more"
        )
    if block_ids is None:
        if segment_ids is not None:
            raise NotImplementedError("without a selection the kernels take no packed documents")
        return
    if block_size not in (64, 128):
        raise NotImplementedError(f"the kernels take a block_size of 64 or 128, not {block_size}")
    if not 1 <= block_ids.shape[3] <= 64:
        raise NotImplementedError(
            f"the kernels take 1 to 64 blocks per query, not {block_ids.shape[3]}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, q, k, main_lse, index_q, index_k, *place):
    return _value(options, q, k, main_lse, index_q, index_k, *place)


def _forward(options: _Options, *arrays):
    kl, index_lse = _align(options, *arrays)
    return (kl, index_lse), (arrays, index_lse)


def _backward(options: _Options, residuals, cotangents):
    arrays, index_lse = residuals
    index_q, index_k = _gradients(options, *arrays, index_lse, *cotangents)
    return None, None, None, index_q, index_k, None, None, None


_align.defvjp(_forward, _backward)


@in_32_bits
def _value(options: _Options, q, k, main_lse, index_q, index_k, *place):
    call = _Call(options, q, k, main_lse, index_q, index_k, *place)
    config = options.config

    def chunk(start):
        tiles = call.tiles(start)
        inputs = call.inputs(tiles)
        terms = block_terms(inputs, tiles, call.scales, config.tiles)
        return _combined(terms, tiles.places)

    def add(carry, start):
        return carry, chunk(start)

    bytes_per_tile = call.input_bytes + NUM_TERMS * TILE_QUERIES * 4
    _, (kl, index_lse) = _scan(add, (), *call.chunk(bytes_per_tile))
    return call.whole(kl), call.whole(index_lse)


def _combined(
    terms: Float[Array, "M terms 64"], places: Int[Array, "B Hkv T K"]
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """Value and log-sum-exp over each query's blocks, natural; 0 and -inf for a query without."""
    at = jnp.maximum(places, 0)
    tile, row = at // TILE_QUERIES, at % TILE_QUERIES

    def term(number, nobody):
        values = terms.at[tile, number, row].get(mode="promise_in_bounds")
        return jnp.where(places >= 0, values, nobody)

    lse = term(LSE, -jnp.inf)
    peak = lse.max(-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = peak[..., 0] + jnp.log2(jnp.exp2(lse - peak).sum(-1))
    # A block's terms are relative to its own log-sum-exp: what is added up stays small.
    more = jnp.where(lse == -jnp.inf, 0.0, total[..., None] - lse)
    kl = (term(DIVERGENCE, 0.0) + term(MASS, 0.0) * more).sum(-1)
    return kl / _LOG2_E, total / _LOG2_E


@in_32_bits
def _gradients(
    options: _Options, q, k, main_lse, index_q, index_k, *place_and_cotangents
) -> tuple[jax.Array, jax.Array]:
    """Gradients of index_q and index_k."""
    *place, index_lse, d_kl, d_index_lse = place_and_cotangents
    call = _Call(options, q, k, main_lse, index_q, index_k, *place)
    config = options.config
    # Of a known size, a power of two apart, whatever the loss is divided by: float16 holds them.
    most = jnp.maximum(jnp.abs(d_kl).max(), jnp.abs(d_index_lse).max())
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(most > 0, most, 1.0))))
    teacher_factor = d_kl / unit * options.index_scale
    student_factor = teacher_factor + d_index_lse / unit * options.index_scale
    per_teacher = 2.0**-TEACHER_SHIFT / call.scales.num_heads
    factors = [
        jnp.where(jnp.isfinite(index_lse), index_lse, 0.0) * _LOG2_E,
        student_factor,
        teacher_factor * per_teacher,
    ]
    factors = jnp.moveaxis(jnp.stack(factors, axis=-1), 2, 1)
    factors = factors.reshape(-1, *factors.shape[2:])

    def add(total, start):
        tiles = call.tiles(start)
        inputs = call.inputs(tiles)
        rows = by_row(factors, tiles, 0.0).swapaxes(1, 2)
        gradients, partial = score_gradients(inputs, rows, tiles, call.scales, config.tiles)
        total += index_k_gradient(
            gradients, inputs.index_q, tiles, call.num_key_blocks, config.index_k
        )
        return total, _summed(partial, tiles.places)

    block_size, width = options.block_size, call.width
    bytes_per_tile = call.input_bytes + TILE_QUERIES * (width + block_size) * q.dtype.itemsize
    nothing = jnp.zeros((call.num_key_blocks * block_size, width), jnp.float32)
    total, d_index_q = _scan(add, nothing, *call.chunk(bytes_per_tile))
    d_index_q = (call.whole(d_index_q) * unit).swapaxes(1, 2)[..., : index_q.shape[-1]]
    d_index_k = (total * unit).reshape(len(q), -1, width)[:, : k.shape[1], : index_k.shape[-1]]
    return d_index_q.astype(index_q.dtype), d_index_k.astype(index_k.dtype)


def _summed(
    partial: Float[Array, "M 64 W"], places: Int[Array, "B Hkv T K"]
) -> Float[Array, "B Hkv T W"]:
    """Sum over each query's blocks, in their order."""
    flat = partial.reshape(-1, partial.shape[-1])
    top_k = places.shape[3]
    at_a_time = min(top_k, _SUMMED_AT_A_TIME)
    missing = -top_k % at_a_time
    places = jnp.pad(places, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=-1)

    def add(i, total):
        at = jax.lax.dynamic_slice_in_dim(places, i * at_a_time, at_a_time, axis=3)
        found = flat.at[jnp.maximum(at, 0)].get(mode="promise_in_bounds")
        return total + jnp.where((at >= 0)[..., None], found.astype(jnp.float32), 0.0).sum(3)

    nothing = jnp.zeros((*places.shape[:3], partial.shape[-1]), jnp.float32)
    if top_k == at_a_time:
        return add(0, nothing)
    return jax.lax.fori_loop(0, places.shape[3] // at_a_time, add, nothing)


class _Call:
    """The arrays of one call as the kernels take them, and its cut into chunks of queries."""

    def __init__(
        self, options: _Options, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset
    ):
        self.options, self.config = options, options.config
        self.batch, self.num_queries, num_heads, head_dim = q.shape
        self.groups, block_size = k.shape[2], options.block_size
        heads = num_heads // self.groups
        self.scales = Scales(block_size, options.scale, options.index_scale, heads)
        self.padded_heads = max(8, 1 << (heads - 1).bit_length())
        self.width = max(head_dim, index_q.shape[-1])
        self.itemsize = q.dtype.itemsize
        self.num_blocks = -(-k.shape[1] // block_size)
        self.num_key_blocks = self.batch * self.num_blocks
        slots = self.num_blocks * block_size - k.shape[1]
        no_heads = (0, self.padded_heads - heads)
        grouped = q.reshape(*q.shape[:2], self.groups, heads, head_dim)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), no_heads, (0, 0)))
        self.q = self._flat(grouped.reshape(*q.shape[:2], -1, head_dim))
        self.k = self._flat(jnp.pad(k, ((0, 0), (0, slots), (0, 0), (0, 0))))
        self.index_q = self._flat(index_q)
        self.index_k = self._flat(jnp.pad(index_k, ((0, 0), (0, slots), (0, 0))))
        offset = options.query_offset if options.query_offset is not None else offset
        self.offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (self.batch,))
        self.block_ids = None
        if block_ids is not None:
            self.block_ids = visible_block_ids(block_ids, segment_ids, offset, block_size)
        lse = main_lse.reshape(self.batch, self.groups, heads, -1) * _LOG2_E - TEACHER_SHIFT
        # Where a head is none its probabilities are 0.
        padding = ((0, 0), (0, 0), no_heads, (0, 0))
        lse = jnp.pad(lse.astype(jnp.float32), padding, constant_values=jnp.inf)
        self.lse = jnp.moveaxis(lse, 3, 1).reshape(-1, self.groups, self.padded_heads)
        self.length = self.num_queries

    def _flat(self, array: Float[Array, "B length *rest dim"]) -> Float[Array, "rows *rest W"]:
        """Rows of all batch rows after each other, with zeros up to `width`."""
        missing = self.width - array.shape[-1]
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
        return array.reshape(-1, *array.shape[2:])

    @property
    def input_bytes(self) -> int:
        """What a row tile's inputs take."""
        return TILE_QUERIES * (self.width * self.itemsize + self.padded_heads * 4 + 16)

    @property
    def row(self) -> int:
        """Queries that a chunk holds a whole number of."""
        if self.block_ids is None:
            return TILE_QUERIES
        top_k = self.block_ids.shape[3]
        return self.config.queries_per_row or row_length(self.num_queries, self.num_blocks, top_k)

    def chunk(self, bytes_per_tile: int) -> tuple[int, int]:
        """Queries per chunk, and how many chunks: whole rows, evenly spread."""
        blocks, row = self.num_key_blocks * self.groups, self.row
        if self.block_ids is None:
            tiles = blocks * row // TILE_QUERIES
        else:
            entries = row * self.block_ids.shape[3] * self.groups * self.batch
            tiles = -(-entries // TILE_QUERIES) + min(blocks, entries)
        most = max(1, self.config.chunk_bytes // (tiles * bytes_per_tile)) * row
        number = -(-self.num_queries // most)
        self.length = -(-self.num_queries // (number * row)) * row
        if self.block_ids is not None:
            behind = number * self.length - self.num_queries
            padding = ((0, 0), (0, 0), (0, behind), (0, 0))
            self.block_ids = jnp.pad(self.block_ids, padding, constant_values=-1)
        return self.length, number

    def tiles(self, start) -> Tiles:
        """Those of the chunk that starts with this query."""
        first_query = jnp.arange(self.batch, dtype=jnp.int32) * self.num_queries + start
        first_slot = self.offsets + start
        blocks = {"num_blocks": self.num_blocks, "block_size": self.options.block_size}
        if self.block_ids is None:
            return dense_tiles(
                first_query,
                first_slot,
                self.num_queries - start,
                num_queries=self.length,
                groups=self.groups,
                **blocks,
            )
        block_ids = jax.lax.dynamic_slice_in_dim(self.block_ids, start, self.length, axis=2)
        return selected_tiles(
            block_ids, first_query, first_slot, queries_per_row=self.row, **blocks
        )

    def inputs(self, tiles: Tiles) -> TileInputs:
        """The kernels' arrays for a chunk's tiles."""
        lse = by_row(self.lse, tiles, jnp.inf).reshape(len(tiles.queries), -1, STEP_ROWS)
        return TileInputs(self.q, self.k, by_row(self.index_q, tiles, 0.0), self.index_k, lse)

    def whole(
        self, chunks: Float[Array, "chunks B Hkv length *rest"]
    ) -> Float[Array, "B Hkv queries *rest"]:
        """The chunks' results one after the other, less what was added to fill the last."""
        chunks = jnp.moveaxis(chunks, 0, 2)
        merged = chunks.reshape(*chunks.shape[:2], -1, *chunks.shape[4:])
        return merged[:, :, : self.num_queries]


def _scan(add, carry, length: int, number: int):
    """`jax.lax.scan` of `add` over the chunks' first queries; a single chunk needs no loop."""
    if number == 1:
        carry, result = add(carry, jnp.int32(0))
        return carry, jax.tree.map(lambda x: x[None], result)
    return jax.lax.scan(add, carry, jnp.arange(number, dtype=jnp.int32) * length)
