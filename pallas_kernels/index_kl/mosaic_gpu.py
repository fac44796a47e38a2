"""`index_kl` on NVIDIA Hopper: what its kernels serve, and what is made of their results.

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

from pallas_kernels.index_kl.block_terms_mosaic_gpu import DIVERGENCE, LSE, MASS, block_terms
from pallas_kernels.index_kl.chunks_mosaic_gpu import (
    Call,
    as_kernels_take,
    chunk_tiles,
    cut,
    joined,
    scan_chunks,
    tile_inputs,
)
from pallas_kernels.index_kl.index_k_mosaic_gpu import IndexKConfig, index_k_gradient
from pallas_kernels.index_kl.score_gradients_mosaic_gpu import (
    STUDENT_FACTOR,
    STUDENT_LSE,
    TEACHER_FACTOR,
    score_gradients,
)
from pallas_kernels.index_kl.tiles import TILE_QUERIES, by_row
from pallas_kernels.index_kl.tiles_mosaic_gpu import (
    NUM_TERMS,
    STEP_ROWS,
    TEACHER_SHIFT,
    Scales,
    TileConfig,
)
from pallas_kernels.mosaic_gpu import current_target
from pallas_kernels.sparse_attention.mosaic_gpu import MIN_QUERIES
from pallas_kernels.tracing import in_32_bits, refuse_varying

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
      chunk_bytes: of device memory that a chunk's results per query and block may take; a chunk
        has one row of queries at least.
      queries_per_row: of the reverse index, by default twice what `row_length` chooses for it.
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
def _value(options: _Options, *arrays):
    config = options.config
    call, chunks = cut(
        _call(options, *arrays),
        NUM_TERMS * TILE_QUERIES * 4,
        config.chunk_bytes,
        config.queries_per_row,
    )

    def add(carry, start):
        tiles = chunk_tiles(call, chunks, start)
        terms = block_terms(tile_inputs(call, tiles), tiles, call.scales, config.tiles)
        return carry, _combined(terms, tiles.places)

    _, (kl, index_lse) = scan_chunks(add, (), chunks)
    return joined(kl, call.num_queries), joined(index_lse, call.num_queries)


def _call(
    options: _Options, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset
) -> Call:
    heads = q.shape[2] // k.shape[2]
    scales = Scales(options.block_size, options.scale, options.index_scale, heads)
    if options.query_offset is not None:
        offset = options.query_offset
    return as_kernels_take(scales, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset)


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
    config, dtype = options.config, q.dtype
    call = _call(options, q, k, main_lse, index_q, index_k, *place)
    block_size, width = options.block_size, call.q.shape[-1]
    result_bytes = TILE_QUERIES * (width + block_size) * dtype.itemsize
    call, chunks = cut(call, result_bytes, config.chunk_bytes, config.queries_per_row)
    factors, unit = _factors(call.scales, index_lse, d_kl, d_index_lse)

    def add(total, start):
        tiles = chunk_tiles(call, chunks, start)
        inputs = tile_inputs(call, tiles)
        rows = by_row(factors, tiles, 0.0).swapaxes(1, 2)
        gradients, partial = score_gradients(inputs, rows, tiles, call.scales, config.tiles)
        total += index_k_gradient(
            gradients, inputs.index_q, tiles, call.num_key_blocks, config.index_k
        )
        return total, (_summed(partial, tiles.places) * unit).astype(dtype)

    nothing = jnp.zeros((call.num_key_blocks * block_size, width), jnp.float32)
    total, d_index_q = scan_chunks(add, nothing, chunks)
    d_index_q = joined(d_index_q, call.num_queries).swapaxes(1, 2)[..., : index_q.shape[-1]]
    d_index_k = (total * unit).astype(dtype).reshape(len(q), -1, width)
    return d_index_q, d_index_k[:, : k.shape[1], : index_k.shape[-1]]


def _factors(
    scales: Scales, index_lse, d_kl, d_index_lse
) -> tuple[Float[Array, "queries Hkv factors"], Float[Array, ""]]:
    """The factors of `score_gradients` per query and group, and the unit that these are in."""
    # Of a known size, whatever the loss is divided by: float16 holds the gradients in this unit.
    most = jnp.maximum(jnp.abs(d_kl).max(), jnp.abs(d_index_lse).max())
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(most > 0, most, 1.0))))
    teacher = d_kl / unit * scales.index_scale
    factors = {
        STUDENT_LSE: jnp.where(jnp.isfinite(index_lse), index_lse, 0.0) * _LOG2_E,
        STUDENT_FACTOR: teacher + d_index_lse / unit * scales.index_scale,
        TEACHER_FACTOR: teacher * (2.0**-TEACHER_SHIFT / scales.num_heads),
    }
    stacked = jnp.stack([factors[i] for i in range(len(factors))], axis=-1)
    return jnp.moveaxis(stacked, 2, 1).reshape(-1, stacked.shape[1], len(factors)), unit


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
