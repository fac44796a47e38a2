"""Gradients of attention over selected blocks in Triton, from the saved log-sum-exp.

The gradient of a query is summed by one program over its blocks, as in the forward pass. Those of
keys and values are summed over the queries that picked the block: a program per slice of a block's
list, head by head, and then a program per block that adds up its slices in order. No atomics.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.block_lists import BlockLists, block_lists
from pallas_kernels.triton import key_tile, launch, padded

# A block has Bk * K queries on average, 2048 for 128 and 16, so that most lists are one slice.
QUERIES_PER_SLICE = 4096
# Queries per step of a slice; together with a tile of keys bounded by registers.
QUERY_TILE = 32
KEY_TILE = 64

_LOG2_E = tl.constexpr(1.4426950408889634)


def backward(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    offsets: Int[Array, "B"],
    lse: Float[Array, "B T Hq"],
    do: Float[Array, "B T Hq D"],
    delta: Float[Array, "B T Hq"],
    *,
    block_size: int,
    scale: float,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B S Hkv D"], Float[Array, "B S Hkv D"]]:
    """Gradients of q, k and v.

    Args:
      q: as `forward_triton.forward`, like the next four.
      k: keys.
      v: values.
      block_ids: visible and distinct ones.
      offsets: the key slot of the first query.
      lse: natural log-sum-exp of the forward pass.
      do: cotangent of the output.
      delta: sum over the head's dims of output times `do`, less the cotangent of `lse`.
      block_size: Bk.
      scale: of the scores.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups, num_keys, width = k.shape[2], k.shape[1], padded(head_dim)
    sizes = {
        "num_queries": num_queries,
        "num_keys": num_keys,
        "groups": groups,
        "heads": num_heads // groups,
        "head_dim": head_dim,
        "width": width,
        "block_size": block_size,
        "scale": scale,
    }
    arrays = q, k, v, do, lse, delta
    (dq,) = launch(
        query_gradient_kernel,
        *arrays,
        block_ids,
        offsets,
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(num_queries, groups, batch),
        rows=padded(num_heads // groups),
        top_k=block_ids.shape[3],
        key_tile=key_tile(block_size, width, k.dtype),
        **sizes,
    )
    num_blocks = -(-num_keys // block_size)
    lists = block_lists(block_ids, num_blocks, QUERIES_PER_SLICE)
    tile = min(KEY_TILE, key_tile(block_size, width, k.dtype))
    items = len(lists.slices)
    partial = jax.ShapeDtypeStruct((items, block_size, head_dim), jnp.float32)
    partials = launch(
        key_value_gradient_kernel,
        *arrays,
        lists.queries,
        lists.slices,
        offsets,
        out=(partial, partial),
        grid=(items * (block_size // tile),),
        num_blocks=num_blocks,
        key_tile=tile,
        query_tile=QUERY_TILE,
        num_warps=8,
        **sizes,
    )
    dk, dv = (add_slices(part, lists, k.shape, k.dtype) for part in partials)
    return dq, dk, dv


def add_slices(
    partial: Float[Array, "items Bk D"],
    lists: BlockLists,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B S Hkv D"]:
    """Adds up each block's slices, in their order, and puts the blocks where their keys are.

    Args:
      partial: float32 sums of slices; those that `lists` does not use may hold anything.
      lists: of `shape`'s batch rows, groups and blocks.
      shape: of the result, [B, S, Hkv, D].
      dtype: of the result.
    """
    batch, num_keys, groups, head_dim = shape
    block_size = partial.shape[1]
    num_blocks = -(-num_keys // block_size)
    width = padded(head_dim)
    tile = key_tile(block_size, width, jnp.float32)
    (total,) = launch(
        add_slices_kernel,
        partial,
        lists.first_slices,
        out=(jax.ShapeDtypeStruct(shape, dtype),),
        grid=(num_blocks * (block_size // tile), groups, batch),
        num_keys=num_keys,
        num_blocks=num_blocks,
        groups=groups,
        head_dim=head_dim,
        width=width,
        block_size=block_size,
        key_tile=tile,
    )
    return total


@triton.jit
@no_type_check
def query_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    block_ids,
    offsets,
    dq,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    groups: tl.constexpr,
    heads: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    top_k: tl.constexpr,
    block_size: tl.constexpr,
    key_tile: tl.constexpr,
    scale: tl.constexpr,
):
    """Writes the gradients of one query's heads."""
    query, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.minimum(tl.load(offsets + row) + query, num_keys - 1)
    head = tl.arange(0, rows)
    dim = tl.arange(0, width)
    key = tl.arange(0, key_tile)
    place = ((row.to(tl.int64) * num_queries + query) * groups + group) * heads
    tile = head[:, None] * head_dim + dim[None, :]
    inside = (head < heads)[:, None] & (dim < head_dim)[None, :]
    q_tile = tl.load(q + place * head_dim + tile, mask=inside, other=0.0)
    do_tile = tl.load(do + place * head_dim + tile, mask=inside, other=0.0)
    row_lse = tl.load(lse + place + head, mask=head < heads, other=0.0) * _LOG2_E
    row_delta = tl.load(delta + place + head, mask=head < heads, other=0.0)
    ids = block_ids + ((row.to(tl.int64) * groups + group) * num_queries + query) * top_k
    first_key = row.to(tl.int64) * num_keys * groups + group
    key_offsets = key[:, None] * (groups * head_dim) + dim[None, :]
    gradient = tl.zeros([rows, width], tl.float32)
    for step in range(top_k * (block_size // key_tile)):
        block = tl.load(ids + step // (block_size // key_tile))
        start = block * block_size + step % (block_size // key_tile) * key_tile
        seen = (start + key <= slot) & (block >= 0)
        mask = seen[:, None] & (dim < head_dim)[None, :]
        base = (first_key + start.to(tl.int64) * groups) * head_dim
        k_tile = tl.load(k + base + key_offsets, mask=mask, other=0.0)
        v_tile = tl.load(v + base + key_offsets, mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * _LOG2_E)
        weights = tl.where(seen[None, :], tl.exp2(scores - row_lse[:, None]), 0.0)
        d_weights = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        d_scores = weights * (d_weights - row_delta[:, None])
        gradient = tl.dot(d_scores.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")
    gradient = (gradient * scale).to(dq.dtype.element_ty)
    tl.store(dq + place * head_dim + tile, gradient, mask=inside)


@triton.jit
@no_type_check
def key_value_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    queries,
    slices,
    offsets,
    dk,
    dv,
    num_queries: tl.constexpr,
    num_keys: tl.constexpr,
    num_blocks: tl.constexpr,
    groups: tl.constexpr,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block_size: tl.constexpr,
    key_tile: tl.constexpr,
    query_tile: tl.constexpr,
    scale: tl.constexpr,
):
    """Writes gradients of a part of a block's keys and values, summed over a slice of queries."""
    # Parts of a block run side by side and find the queries in the L2 cache.
    item = tl.program_id(0) // (block_size // key_tile)
    part = tl.program_id(0) % (block_size // key_tile)
    owner = tl.load(slices + item * 3)
    first, last = tl.load(slices + item * 3 + 1), tl.load(slices + item * 3 + 2)
    if first == last:
        return
    row = owner // num_blocks // groups
    group = owner // num_blocks % groups
    dim = tl.arange(0, width)
    entry = tl.arange(0, query_tile)
    slot = owner % num_blocks * block_size + part * key_tile + tl.arange(0, key_tile)
    key_place = (row.to(tl.int64) * num_keys + slot) * groups + group
    inside = (slot < num_keys)[:, None] & (dim < head_dim)[None, :]
    tile = key_place[:, None] * head_dim + dim[None, :]
    k_tile = tl.load(k + tile, mask=inside, other=0.0)
    v_tile = tl.load(v + tile, mask=inside, other=0.0)
    offset = tl.load(offsets + row)
    d_keys = tl.zeros([key_tile, width], tl.float32)
    d_values = tl.zeros([key_tile, width], tl.float32)
    for step in range(tl.cdiv(last - first, query_tile) * heads):
        at = first + step // heads * query_tile + entry
        query = tl.load(queries + at, mask=at < last, other=0)
        place = (row.to(tl.int64) * num_queries + query) * groups + group
        place = place * heads + step % heads
        mask = (at < last)[:, None] & (dim < head_dim)[None, :]
        rows = place[:, None] * head_dim + dim[None, :]
        q_tile = tl.load(q + rows, mask=mask, other=0.0)
        do_tile = tl.load(do + rows, mask=mask, other=0.0)
        row_lse = tl.load(lse + place, mask=at < last, other=0.0) * _LOG2_E
        row_delta = tl.load(delta + place, mask=at < last, other=0.0)
        seen = (slot[:, None] <= (offset + query)[None, :]) & (at < last)[None, :]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * (scale * _LOG2_E)
        weights = tl.where(seen, tl.exp2(scores - row_lse[None, :]), 0.0)
        d_values = tl.dot(weights.to(do_tile.dtype), do_tile, d_values, input_precision="ieee")
        d_weights = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        d_scores = weights * (d_weights - row_delta[None, :])
        d_keys = tl.dot(d_scores.to(q_tile.dtype), q_tile, d_keys, input_precision="ieee")
    place = item.to(tl.int64) * block_size + part * key_tile + tl.arange(0, key_tile)
    rows = place[:, None] * head_dim + dim[None, :]
    everywhere = (place >= 0)[:, None] & (dim < head_dim)[None, :]
    tl.store(dk + rows, d_keys * scale, mask=everywhere)
    tl.store(dv + rows, d_values, mask=everywhere)


@triton.jit
@no_type_check
def add_slices_kernel(
    partial,
    first_slices,
    out,
    num_keys: tl.constexpr,
    num_blocks: tl.constexpr,
    groups: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block_size: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Writes the sum of a block's slices, for a part of its keys."""
    block = tl.program_id(0) // (block_size // key_tile)
    part = tl.program_id(0) % (block_size // key_tile)
    group, row = tl.program_id(1), tl.program_id(2)
    key = part * key_tile + tl.arange(0, key_tile)
    dim = tl.arange(0, width)
    slot = block * block_size + key
    inside = (slot < num_keys)[:, None] & (dim < head_dim)[None, :]
    owner = (row * groups + group) * num_blocks + block
    total = tl.zeros([key_tile, width], tl.float32)
    for item in range(tl.load(first_slices + owner), tl.load(first_slices + owner + 1)):
        rows = (item * block_size + key).to(tl.int64)[:, None] * head_dim + dim[None, :]
        total += tl.load(partial + rows, mask=inside, other=0.0)
    place = (row.to(tl.int64) * num_keys + slot) * groups + group
    tile = place[:, None] * head_dim + dim[None, :]
    tl.store(out + tile, total.to(out.dtype.element_ty), mask=inside)
