"""The KL loss over selected blocks in Triton, one query and group per program.

The log-sum-exp of the main scores is known, so that a first pass over the query's blocks gives the
student's and a second one the divergence. The G heads are rows of the main product; of the index
product, padded to as many rows as a tensor core takes, one row is the index query and the others
are 0, so that a sum over the rows is its scores.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.triton import key_tile, launch, padded

_LOG2_E = tl.constexpr(1.4426950408889634)


def divergence(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    block_ids: Int[Array, "B Hkv T K"],
    offsets: Int[Array, "B"],
    lse: Float[Array, "B T Hq"],
    *,
    block_size: int,
    scale: float,
    index_scale: float,
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """The divergence and the student's natural log-sum-exp; 0 and -inf where nothing is seen.

    Args:
      q: main queries.
      k: main keys.
      index_q: index queries.
      index_k: index keys.
      block_ids: visible and distinct ones, -1 anywhere for none.
      offsets: the key slot of the first query.
      lse: natural log-sum-exp of the main scores over the same blocks.
      block_size: Bk, a power of two from 16 on.
      scale: of the main scores.
      index_scale: of the index scores.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups, index_dim = index_q.shape[2:]
    width, index_width = padded(head_dim), padded(index_dim)
    result = jax.ShapeDtypeStruct((batch, groups, num_queries), jnp.float32)
    kl, index_lse = launch(
        divergence_kernel,
        q,
        k,
        index_q,
        index_k,
        block_ids,
        offsets,
        lse,
        out=(result, result),
        grid=(num_queries, groups, batch),
        num_queries=num_queries,
        num_keys=k.shape[1],
        groups=groups,
        heads=num_heads // groups,
        rows=padded(num_heads // groups),
        head_dim=head_dim,
        width=width,
        index_dim=index_dim,
        index_width=index_width,
        top_k=block_ids.shape[3],
        block_size=block_size,
        key_tile=key_tile(block_size, max(width, index_width), k.dtype),
        scale=scale,
        index_scale=index_scale,
    )
    return kl, index_lse


@triton.jit
@no_type_check
def index_scores(index_query, index_keys, index_scale: tl.constexpr):
    """One score per key, of an index query that is one row of [16, Di] among zeros."""
    scores = tl.dot(index_query, tl.trans(index_keys), input_precision="ieee")
    return tl.sum(scores, axis=0) * index_scale


@triton.jit
@no_type_check
def teacher(query, keys, row_lse, seen, heads: tl.constexpr, rows: tl.constexpr, scale):
    """The mean over the heads of their probabilities, one per key."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * _LOG2_E)
    real = (tl.arange(0, rows) < heads)[:, None] & seen[None, :]
    weights = tl.where(real, tl.exp2(scores - row_lse[:, None]), 0.0)
    return tl.sum(weights, axis=0) / heads


@triton.jit
@no_type_check
def divergence_kernel(
    q,
    k,
    index_q,
    index_k,
    block_ids,
    offsets,
    lse,
    kl,
    index_lse,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    groups: tl.constexpr,
    heads: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    index_dim: tl.constexpr,
    index_width: tl.constexpr,
    top_k: tl.constexpr,
    block_size: tl.constexpr,
    key_tile: tl.constexpr,
    scale: tl.constexpr,
    index_scale: tl.constexpr,
):
    """Writes one query's divergence and the student's log-sum-exp."""
    query, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.minimum(tl.load(offsets + row) + query, num_keys - 1)
    head = tl.arange(0, rows)
    dim = tl.arange(0, width)
    index_head = tl.arange(0, 16)
    index_column = tl.arange(0, index_width)
    key = tl.arange(0, key_tile)
    place = (row.to(tl.int64) * num_queries + query) * groups + group
    q_tile = tl.load(
        q + place * heads * head_dim + head[:, None] * head_dim + dim[None, :],
        mask=(head < heads)[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )
    row_lse = tl.load(lse + place * heads + head, mask=head < heads, other=0.0) * _LOG2_E
    index_tile = tl.load(
        index_q + place * index_dim + index_head[:, None] * 0 + index_column[None, :],
        mask=(index_head == 0)[:, None] & (index_column < index_dim)[None, :],
        other=0.0,
    )
    out = (row.to(tl.int64) * groups + group) * num_queries + query
    ids = block_ids + out * top_k
    first_key = row.to(tl.int64) * num_keys
    parts: tl.constexpr = block_size // key_tile
    index_offsets = key[:, None] * index_dim + index_column[None, :]
    key_offsets = key[:, None] * (groups * head_dim) + dim[None, :]
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for step in range(top_k * parts):
        block = tl.load(ids + step // parts)
        start = block * block_size + step % parts * key_tile
        seen = (start + key <= slot) & (block >= 0)
        mask = seen[:, None] & (index_column < index_dim)[None, :]
        base = (first_key + start.to(tl.int64)) * index_dim
        keys = tl.load(index_k + base + index_offsets, mask=mask, other=0.0)
        scores = tl.where(seen, index_scores(index_tile, keys, index_scale), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((scores - shift) * _LOG2_E)
        total = total * tl.exp2((top - shift) * _LOG2_E) + tl.sum(weights, axis=0)
        top = new_top
    empty = total == 0.0
    student_lse = top + tl.log(tl.where(empty, 1.0, total))
    result = tl.where(empty, 0.0, student_lse)
    for step in range(top_k * parts):
        block = tl.load(ids + step // parts)
        start = block * block_size + step % parts * key_tile
        seen = (start + key <= slot) & (block >= 0)
        mask = seen[:, None] & (index_column < index_dim)[None, :]
        base = (first_key + start.to(tl.int64)) * index_dim
        keys = tl.load(index_k + base + index_offsets, mask=mask, other=0.0)
        scores = index_scores(index_tile, keys, index_scale)
        mask = seen[:, None] & (dim < head_dim)[None, :]
        base = ((first_key + start.to(tl.int64)) * groups + group) * head_dim
        keys = tl.load(k + base + key_offsets, mask=mask, other=0.0)
        mean = teacher(q_tile, keys, row_lse, seen, heads, rows, scale)
        # KL = sum t log t - sum t s + lse of s: t sums to 1, and 0 log 0 is 0.
        entropy = mean * tl.log(tl.where(mean > 0, mean, 1.0))
        result += tl.sum(tl.where(seen, entropy - mean * scores, 0.0), axis=0)
    one = tl.arange(0, 1)
    tl.store(kl + out + one, result)
    tl.store(index_lse + out + one, student_lse)
