"""Block selection in one Triton kernel: scores, pooling and an exact running top-k.

A program scores a tile of queries against one key block after the other. The pooled scores of as
many blocks as the list is long are gathered in a matrix [queries, blocks] and merged into the list
of the best by bitonic networks, so that scores never leave the program.

A candidate is one 64-bit integer: its score, as an integer of the same order, above the bits of its
id, counted down. The order of these integers is score descending, then lower id.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.triton import key_tile, launch, padded

MAX_TOP_K = 64
QUERY_TILE = 64
# In half precision twice the tile of other kernels: there are no values. Without tensor cores
# registers hold the operands.
_KEY_TILE_FACTOR = {2: 2, 4: 1}

_LARGEST = tl.constexpr(3.4028234663852886e38)
_LAST_ID = tl.constexpr(2**31 - 1)
_NOTHING = tl.constexpr(-(2**63))


def select(
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    own: Int[Array, "B T"],
    first: Int[Array, "B T"],
    *,
    block_size: int,
    top_k: int,
    num_local_blocks: int,
    num_sink_blocks: int,
    pooling: str,
    scale: float,
) -> Int[Array, "B Hkv T K"]:
    """The ids of the K best blocks per query and group, ascending, then -1.

    Args:
      index_q: index queries.
      index_k: index keys.
      own: each query's own block; -1 selects nothing.
      first: the first block of its document.
      block_size: Bk, a power of two from 16 on.
      top_k: K, up to `MAX_TOP_K`.
      num_local_blocks: as `select_blocks`, like the rest.
      num_sink_blocks: leading blocks.
      pooling: "max", "lse" or "mean".
      scale: of the scores.
    """
    batch, num_queries, groups, index_dim = index_q.shape
    width = padded(index_dim)
    tile = key_tile(block_size, width, index_k.dtype) * _KEY_TILE_FACTOR[index_k.dtype.itemsize]
    (block_ids,) = launch(
        select_kernel,
        index_q,
        index_k,
        own,
        first,
        out=(jax.ShapeDtypeStruct((batch, groups, num_queries, top_k), jnp.int32),),
        grid=(-(-num_queries // QUERY_TILE), groups, batch),
        num_queries=num_queries,
        num_keys=index_k.shape[1],
        groups=groups,
        index_dim=index_dim,
        width=width,
        block_size=block_size,
        top_k=top_k,
        list_length=max(2, 1 << (top_k - 1).bit_length()),
        num_local_blocks=num_local_blocks,
        num_sink_blocks=num_sink_blocks,
        pooling=pooling,
        scale=scale / block_size if pooling == "mean" else scale,
        query_tile=QUERY_TILE,
        key_tile=min(block_size, tile),
    )
    return block_ids


@triton.jit
@no_type_check
def _pool(scores, pooling: tl.constexpr):
    """One value per row; a NaN score makes it NaN, for "max" +inf."""
    if pooling == "max":
        # A maximum drops NaN, so that NaN goes above all scores.
        finite = tl.minimum(scores, _LARGEST)
        return tl.max(tl.where(scores != scores, float("inf"), finite), axis=1)
    elif pooling == "lse":
        top = tl.max(tl.where(scores != scores, float("-inf"), scores), axis=1)
        shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        return shift + tl.log(tl.sum(tl.exp(scores - shift[:, None]), axis=1))
    else:
        return tl.sum(scores, axis=1)


@triton.jit
@no_type_check
def _merge(a, b, pooling: tl.constexpr):
    """Pools two pooled values."""
    if pooling == "max":
        return tl.maximum(a, b)
    elif pooling == "lse":
        top = tl.maximum(a, b)
        shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))
    else:
        return a + b


@triton.jit
@no_type_check
def _candidates(
    pooled,
    block,
    own,
    first,
    num_local_blocks: tl.constexpr,
    num_sink_blocks: tl.constexpr,
    pooling: tl.constexpr,
):
    """The integers that stand for (score, id), `_NOTHING` for blocks not to be chosen."""
    bad = (pooled == float("inf")) if pooling == "max" else (pooled != pooled)
    score = tl.where(bad, float("-inf"), tl.minimum(pooled, _LARGEST))
    seen = (block <= own) & (block >= first)
    forced = (block > own - num_local_blocks) | (block < first + num_sink_blocks)
    score = tl.where(forced, float("inf"), score)
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals +0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    candidate = (ordered.to(tl.int64) << 32) | (block ^ _LAST_ID).to(tl.int64)
    return tl.where(seen & (score > float("-inf")), candidate, _NOTHING)


@triton.jit
@no_type_check
def select_kernel(
    index_q,
    index_k,
    own_blocks,
    first_blocks,
    block_ids,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    groups: tl.constexpr,
    index_dim: tl.constexpr,
    width: tl.constexpr,
    block_size: tl.constexpr,
    top_k: tl.constexpr,
    list_length: tl.constexpr,
    num_local_blocks: tl.constexpr,
    num_sink_blocks: tl.constexpr,
    pooling: tl.constexpr,
    scale: tl.constexpr,
    query_tile: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Writes the block ids of a tile of queries of one group."""
    # Late tiles have the most blocks: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group, row = tl.program_id(1), tl.program_id(2)
    query = tile * query_tile + tl.arange(0, query_tile)
    real = query < num_queries
    dim = tl.arange(0, width)
    key = tl.arange(0, key_tile)
    entry = tl.arange(0, list_length)
    place = (row.to(tl.int64) * num_queries + query) * groups + group
    inside = real[:, None] & (dim < index_dim)[None, :]
    q_tile = tl.load(index_q + place[:, None] * index_dim + dim[None, :], mask=inside, other=0.0)
    own = tl.load(own_blocks + row * num_queries + query, mask=real, other=-1)
    # Of a query that selects nothing any block is before the first.
    first = tl.load(first_blocks + row * num_queries + query, mask=real, other=_LAST_ID)
    begin, end = tl.min(first, axis=0), tl.max(own, axis=0)
    parts: tl.constexpr = block_size // key_tile
    best = tl.full([query_tile, list_length], _NOTHING, tl.int64)
    for chunk in range(begin // list_length, end // list_length + 1):
        start = chunk * list_length
        pooled = tl.full(
            [query_tile, list_length], 0.0 if pooling == "mean" else float("-inf"), tl.float32
        )
        # Blocks before the own one are seen as a whole; the own one is always chosen.
        for step in range(
            tl.maximum(start, begin) * parts, tl.minimum(start + list_length, end) * parts
        ):
            base = (row.to(tl.int64) * num_keys + step * key_tile) * index_dim
            k_tile = tl.load(
                index_k + base + key[:, None] * index_dim + dim[None, :],
                mask=(dim < index_dim)[None, :] & (key >= 0)[:, None],
                other=0.0,
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            merged = _merge(pooled, _pool(scores, pooling)[:, None], pooling)
            pooled = tl.where((entry == step // parts - start)[None, :], merged, pooled)
        candidates = _candidates(
            pooled,
            (start + entry)[None, :],
            own[:, None],
            first[:, None],
            num_local_blocks,
            num_sink_blocks,
            pooling,
        )
        # The larger of a descending and an ascending list are the best of both.
        candidates = tl.sort(candidates, descending=False)
        best = tl.bitonic_merge(tl.maximum(best, candidates), descending=True)
    chosen = (best != _NOTHING) & (entry < top_k)[None, :]
    ids = tl.where(chosen, (best & _LAST_ID).to(tl.int32) ^ _LAST_ID, _LAST_ID)
    ids = tl.sort(ids)
    ids = tl.where(ids == _LAST_ID, -1, ids)
    out = ((row.to(tl.int64) * groups + group) * num_queries + query) * top_k
    tl.store(
        block_ids + out[:, None] + entry[None, :],
        ids,
        mask=real[:, None] & (entry < top_k)[None, :],
    )
