"""`index_kl` on NVIDIA Hopper: what its kernels serve, and what is made of their results.

The forward pass computes value and gradients, for the teacher is most of the work of either; the
backward pass multiplies by a number. Both go in chunks of queries, so that what the kernels write
per query and block takes bounded room. Selected blocks and the causal prefix differ in their tiles
only.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.align_mosaic_gpu import align_tiles
from pallas_kernels.index_kl.chunks_mosaic_gpu import (
    Call,
    as_kernels_take,
    chunk_tiles,
    cut,
    joined,
    scan_chunks,
    tile_factors,
    tile_inputs,
)
from pallas_kernels.index_kl.index_k_mosaic_gpu import IndexKConfig, index_k_gradient
from pallas_kernels.index_kl.log_sum_exp_mosaic_gpu import block_log_sum_exp
from pallas_kernels.index_kl.tiles import TILE_QUERIES
from pallas_kernels.index_kl.tiles_mosaic_gpu import STEP_ROWS, Scales, TileConfig
from pallas_kernels.mosaic_gpu import current_target
from pallas_kernels.residuals import INDEX_GRADIENTS
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
    weights: Float[Array, "B Hkv T"],
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    config: IndexKLConfig | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """Weighted sum of KL(teacher || student), its terms, and the student's log-sum-exp, in nats.

    The sum alone has gradients.

    Args:
      q: bfloat16 or float16, at least 64 queries of head_dim 64 or 128, at most 64 per group.
      k: keys.
      index_q: index queries of 64 or 128 dims, in q's dtype.
      index_k: index keys.
      block_ids: up to 64 per query; None for the whole causal prefix.
      segment_ids: document of each key slot, 0 for padding; with block ids only.
      query_offset: the key slot of the first query, per row or for all.
      main_lse: natural log-sum-exp of the main scores over the same support.
      weights: of the sum, per query and group.
      block_size: 64 or 128.
      scale: of the main scores.
      index_scale: of the index scores.
      config: the kernels' shape; None for the default.

    Raises:
      NotImplementedError: no Hopper GPU, or arguments other than the above.
    """
    current_target()
    refuse_varying(q, k, index_q, index_k, block_ids, segment_ids, query_offset, main_lse, weights)
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
    constants = jax.lax.stop_gradient((weights, q, k, main_lse))
    return _align(options, *constants, index_q, index_k, *place)


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


class _Unscaled(NamedTuple):
    """Gradients of the weighted sum divided by `unit`, a power of two: float16 holds them so."""

    index_q: jax.Array
    index_k: jax.Array
    unit: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, *arrays):
    return _value_and_gradients(options, *arrays)[0]


def _forward(options: _Options, *arrays):
    results, gradients = _value_and_gradients(options, *arrays)
    named = (checkpoint_name(gradient, INDEX_GRADIENTS) for gradient in gradients)
    return results, _Unscaled(*named)


def _backward(options: _Options, gradients: _Unscaled, cotangents):
    d_loss, _, _ = cotangents  # those of the terms and the log-sum-exp are no one's
    factor = d_loss * gradients.unit

    def scaled(gradient):
        return (gradient * factor).astype(gradient.dtype)

    constants = (None,) * 4
    return *constants, scaled(gradients.index_q), scaled(gradients.index_k), None, None, None


_align.defvjp(_forward, _backward)


@in_32_bits
def _value_and_gradients(options: _Options, weights, q, k, main_lse, index_q, index_k, *place):
    config, dtype = options.config, q.dtype
    call = _call(options, q, k, main_lse, index_q, index_k, *place)
    block_size, width = options.block_size, call.q.shape[-1]
    result_bytes = TILE_QUERIES * (width + block_size) * dtype.itemsize
    call, chunks = cut(call, result_bytes, config.chunk_bytes, config.queries_per_row)
    most = jnp.abs(weights).max()
    unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(most > 0, most, 1.0))))

    def add(total, start):
        tiles = chunk_tiles(call, chunks, start)
        inputs = tile_inputs(call, tiles)
        found = block_log_sum_exp(inputs, tiles, call.scales, config.tiles)
        lse = _log_sum_exp(_of_blocks(found, tiles.places, -jnp.inf))
        factors = tile_factors(call, chunks, tiles, start, lse, weights / unit)
        parts = align_tiles(inputs, factors, tiles, call.scales, config.tiles)
        kl = _of_blocks(parts.divergence, tiles.places, 0.0).sum(-1)
        total += index_k_gradient(
            parts.gradients, inputs.index_q, tiles, call.num_key_blocks, config.index_k
        )
        d_index_q = _summed(parts.index_q, tiles.places).astype(dtype)
        return total, (kl / _LOG2_E, lse / _LOG2_E, d_index_q)

    nothing = jnp.zeros((call.num_key_blocks * block_size, width), jnp.float32)
    total, results = scan_chunks(add, nothing, chunks)
    kl, index_lse, d_index_q = (joined(result, call.num_queries) for result in results)
    d_index_q = d_index_q.swapaxes(1, 2)[..., : index_q.shape[-1]]
    d_index_k = total.astype(dtype).reshape(len(q), -1, width)
    d_index_k = d_index_k[:, : k.shape[1], : index_k.shape[-1]]
    return ((weights * kl).sum(), kl, index_lse), _Unscaled(d_index_q, d_index_k, unit)


def _call(
    options: _Options, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset
) -> Call:
    heads = q.shape[2] // k.shape[2]
    scales = Scales(options.block_size, options.scale, options.index_scale, heads)
    if options.query_offset is not None:
        offset = options.query_offset
    return as_kernels_take(scales, q, k, main_lse, index_q, index_k, block_ids, segment_ids, offset)


def _of_blocks(
    found: Float[Array, "M 64"], places: Int[Array, "B Hkv T K"], nobody: float
) -> Float[Array, "B Hkv T K"]:
    """What the tiles of each query's blocks found for it."""
    flat = found.reshape(-1)
    values = flat.at[jnp.maximum(places, 0)].get(mode="promise_in_bounds")
    return jnp.where(places >= 0, values, nobody)


def _log_sum_exp(by_block: Float[Array, "B Hkv T K"]) -> Float[Array, "B Hkv T"]:
    """Over a query's blocks, in base 2; -inf for a query without."""
    peak = by_block.max(-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    return peak[..., 0] + jnp.log2(jnp.exp2(by_block - peak).sum(-1))


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
