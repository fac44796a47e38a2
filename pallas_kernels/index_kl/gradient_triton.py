"""Gradients of the KL loss over selected blocks in Triton: student - teacher per index score.

That of an index query is summed by one program over the query's blocks. That of index keys goes
through the lists of queries by block, a program per slice: it goes over tiles of queries, for each
over the heads to form the teacher, and adds to its keys' gradients; then slices and groups are
added up in order. No atomics.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.index_kl.index_kl_triton import index_scores, teacher
from pallas_kernels.sparse_attention.backward_triton import (
    KEY_TILE,
    QUERIES_PER_SLICE,
    QUERY_TILE,
    add_slices,
)
from pallas_kernels.sparse_attention.block_lists import block_lists
from pallas_kernels.triton import key_tile, launch, padded

_LOG2_E = tl.constexpr(1.4426950408889634)


def gradients(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    block_ids: Int[Array, "B Hkv T K"],
    offsets: Int[Array, "B"],
    lse: Float[Array, "B T Hq"],
    index_lse: Float[Array, "B Hkv T"],
    d_kl: Float[Array, "B Hkv T"],
    *,
    block_size: int,
    scale: float,
    index_scale: float,
) -> tuple[Float[Array, "B T Hkv Di"], Float[Array, "B S Di"]]:
    """Gradients of index_q and index_k.

    Args:
      q: as `index_kl_triton.divergence`, like the next six.
      k: main keys.
      index_q: index queries.
      index_k: index keys.
      block_ids: visible and distinct ones.
      offsets: the key slot of the first query.
      lse: of the main scores.
      index_lse: of the index scores, what `divergence` returned.
      d_kl: cotangent of the divergence.
      block_size: Bk.
      scale: of the main scores.
      index_scale: of the index scores.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups, index_dim = index_q.shape[2:]
    num_keys, width, index_width = k.shape[1], padded(head_dim), padded(index_dim)
    sizes = {
        "num_queries": num_queries,
        "num_keys": num_keys,
        "groups": groups,
        "heads": num_heads // groups,
        "head_dim": head_dim,
        "width": width,
        "index_dim": index_dim,
        "index_width": index_width,
        "block_size": block_size,
        "scale": scale,
        "index_scale": index_scale,
    }
    arrays = q, k, index_q, index_k, lse, index_lse, d_kl
    tile = key_tile(block_size, max(width, index_width), k.dtype)
    (d_index_q,) = launch(
        index_query_gradient_kernel,
        *arrays,
        block_ids,
        offsets,
        out=(jax.ShapeDtypeStruct(index_q.shape, index_q.dtype),),
        grid=(num_queries, groups, batch),
        rows=padded(num_heads // groups),
        top_k=block_ids.shape[3],
        key_tile=tile,
        **sizes,
    )
    num_blocks = -(-num_keys // block_size)
    lists = block_lists(block_ids, num_blocks, QUERIES_PER_SLICE)
    items, tile = len(lists.slices), min(KEY_TILE, tile)
    (partial,) = launch(
        index_key_gradient_kernel,
        *arrays,
        lists.queries,
        lists.slices,
        offsets,
        out=(jax.ShapeDtypeStruct((items, block_size, index_dim), jnp.float32),),
        grid=(items * (block_size // tile),),
        num_blocks=num_blocks,
        key_tile=tile,
        query_tile=QUERY_TILE,
        num_warps=8,
        **sizes,
    )
    by_group = add_slices(partial, lists, (batch, num_keys, groups, index_dim), jnp.float32)
    return d_index_q, by_group.sum(2).astype(index_k.dtype)


@triton.jit
@no_type_check
def index_query_gradient_kernel(
    q,
    k,
    index_q,
    index_k,
    lse,
    index_lse,
    d_kl,
    block_ids,
    offsets,
    d_index_q,
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
    """Writes one index query's gradient."""
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
    index_place = place * index_dim + index_head[:, None] * 0 + index_column[None, :]
    index_inside = (index_head == 0)[:, None] & (index_column < index_dim)[None, :]
    index_tile = tl.load(index_q + index_place, mask=index_inside, other=0.0)
    by_group = (row.to(tl.int64) * groups + group) * num_queries + query
    student_lse = tl.load(index_lse + by_group)
    weight = tl.load(d_kl + by_group)
    ids = block_ids + by_group * top_k
    first_key = row.to(tl.int64) * num_keys
    parts: tl.constexpr = block_size // key_tile
    index_offsets = key[:, None] * index_dim + index_column[None, :]
    key_offsets = key[:, None] * (groups * head_dim) + dim[None, :]
    gradient = tl.zeros([16, index_width], tl.float32)
    for step in range(top_k * parts):
        block = tl.load(ids + step // parts)
        start = block * block_size + step % parts * key_tile
        seen = (start + key <= slot) & (block >= 0)
        mask = seen[:, None] & (dim < head_dim)[None, :]
        base = ((first_key + start.to(tl.int64)) * groups + group) * head_dim
        keys = tl.load(k + base + key_offsets, mask=mask, other=0.0)
        mean = teacher(q_tile, keys, row_lse, seen, heads, rows, scale)
        mask = seen[:, None] & (index_column < index_dim)[None, :]
        base = (first_key + start.to(tl.int64)) * index_dim
        keys = tl.load(index_k + base + index_offsets, mask=mask, other=0.0)
        scores = index_scores(index_tile, keys, index_scale)
        student = tl.where(seen, tl.exp2((scores - student_lse) * _LOG2_E), 0.0)
        d_scores = (student - mean) * weight
        # One row of the product, the others are 0.
        d_scores = tl.where((index_head == 0)[:, None], d_scores[None, :], 0.0)
        gradient = tl.dot(d_scores.to(keys.dtype), keys, gradient, input_precision="ieee")
    gradient = (gradient * index_scale).to(d_index_q.dtype.element_ty)
    tl.store(d_index_q + index_place, gradient, mask=index_inside)


@triton.jit
@no_type_check
def index_key_gradient_kernel(
    q,
    k,
    index_q,
    index_k,
    lse,
    index_lse,
    d_kl,
    queries,
    slices,
    offsets,
    partial,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    num_blocks: tl.constexpr,
    groups: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    index_dim: tl.constexpr,
    index_width: tl.constexpr,
    block_size: tl.constexpr,
    key_tile: tl.constexpr,
    query_tile: tl.constexpr,
    scale: tl.constexpr,
    index_scale: tl.constexpr,
):
    """Writes the gradient of a part of a block's index keys, summed over a slice of queries."""
    item = tl.program_id(0) // (block_size // key_tile)
    part = tl.program_id(0) % (block_size // key_tile)
    owner = tl.load(slices + item * 3)
    first, last = tl.load(slices + item * 3 + 1), tl.load(slices + item * 3 + 2)
    if first == last:
        return
    row = owner // num_blocks // groups
    group = owner // num_blocks % groups
    dim = tl.arange(0, width)
    index_column = tl.arange(0, index_width)
    entry = tl.arange(0, query_tile)
    slot = owner % num_blocks * block_size + part * key_tile + tl.arange(0, key_tile)
    key_place = row.to(tl.int64) * num_keys + slot
    k_tile = tl.load(
        k + (key_place * groups + group)[:, None] * head_dim + dim[None, :],
        mask=(slot < num_keys)[:, None] & (dim < head_dim)[None, :],
        other=0.0,
    )
    index_k_tile = tl.load(
        index_k + key_place[:, None] * index_dim + index_column[None, :],
        mask=(slot < num_keys)[:, None] & (index_column < index_dim)[None, :],
        other=0.0,
    )
    offset = tl.load(offsets + row)
    gradient = tl.zeros([key_tile, index_width], tl.float32)
    for step in range(tl.cdiv(last - first, query_tile)):
        at = first + step * query_tile + entry
        real = at < last
        query = tl.load(queries + at, mask=real, other=0)
        place = (row.to(tl.int64) * num_queries + query) * groups + group
        by_group = (row.to(tl.int64) * groups + group) * num_queries + query
        seen = (slot[:, None] <= (offset + query)[None, :]) & real[None, :]
        mean = tl.zeros([key_tile, query_tile], tl.float32)
        for head in range(heads):
            rows = (place * heads + head)[:, None] * head_dim + dim[None, :]
            mask = real[:, None] & (dim < head_dim)[None, :]
            q_tile = tl.load(q + rows, mask=mask, other=0.0)
            row_lse = tl.load(lse + place * heads + head, mask=real, other=0.0) * _LOG2_E
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            scores = scores * (scale * _LOG2_E) - row_lse[None, :]
            mean += tl.where(seen, tl.exp2(scores), 0.0)
        index_tile = tl.load(
            index_q + place[:, None] * index_dim + index_column[None, :],
            mask=real[:, None] & (index_column < index_dim)[None, :],
            other=0.0,
        )
        student_lse = tl.load(index_lse + by_group, mask=real, other=0.0)
        weight = tl.load(d_kl + by_group, mask=real, other=0.0)
        scores = tl.dot(index_k_tile, tl.trans(index_tile), input_precision="ieee")
        scores = (scores * index_scale - student_lse[None, :]) * _LOG2_E
        student = tl.where(seen, tl.exp2(scores), 0.0)
        d_scores = (student - mean / heads) * weight[None, :]
        gradient = tl.dot(
            d_scores.to(index_tile.dtype), index_tile, gradient, input_precision="ieee"
        )
    place = item.to(tl.int64) * block_size + part * key_tile + tl.arange(0, key_tile)
    tl.store(
        partial + place[:, None] * index_dim + index_column[None, :],
        gradient * index_scale,
        mask=(place >= 0)[:, None] & (index_column < index_dim)[None, :],
    )
