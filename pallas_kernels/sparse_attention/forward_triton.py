"""Attention over selected blocks in Triton, one query and group per program.

The G heads of the group are the rows of the matrix products, padded to 16 or more. The program goes
through the query's blocks with an online softmax. Neighbouring programs are neighbouring queries,
which find each other's blocks in the L2 cache.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

from pallas_kernels.triton import key_tile, launch, padded

_LOG2_E = tl.constexpr(1.4426950408889634)


def forward(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    offsets: Int[Array, "B"],
    *,
    block_size: int,
    scale: float,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hq"]]:
    """Output and natural log-sum-exp; 0 and -inf where nothing is seen.

    Args:
      q: queries.
      k: keys.
      v: values.
      block_ids: visible and distinct ones, -1 anywhere for none.
      offsets: the key slot of the first query.
      block_size: Bk, a power of two from 16 on.
      scale: of the scores.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    groups, width = k.shape[2], padded(head_dim)
    o, lse = launch(
        forward_kernel,
        q,
        k,
        v,
        block_ids,
        offsets,
        out=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ),
        grid=(num_queries, groups, batch),
        num_queries=num_queries,
        num_keys=k.shape[1],
        groups=groups,
        heads=num_heads // groups,
        rows=padded(num_heads // groups),
        head_dim=head_dim,
        width=width,
        top_k=block_ids.shape[3],
        block_size=block_size,
        key_tile=key_tile(block_size, width, k.dtype),
        scale=scale,
    )
    return o, lse


@triton.jit
@no_type_check
def forward_kernel(
    q,
    k,
    v,
    block_ids,
    offsets,
    o,
    lse,
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
    """Writes the outputs and log-sum-exps of one query's heads."""
    query, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.minimum(tl.load(offsets + row) + query, num_keys - 1)
    head = tl.arange(0, rows)
    dim = tl.arange(0, width)
    key = tl.arange(0, key_tile)
    place = (row.to(tl.int64) * num_queries + query) * groups + group
    tile = head[:, None] * head_dim + dim[None, :]
    inside = (head < heads)[:, None] & (dim < head_dim)[None, :]
    q_tile = tl.load(q + place * heads * head_dim + tile, mask=inside, other=0.0)
    ids = block_ids + ((row.to(tl.int64) * groups + group) * num_queries + query) * top_k
    first_key = row.to(tl.int64) * num_keys * groups + group
    key_offsets = key[:, None] * (groups * head_dim) + dim[None, :]
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    out = tl.zeros([rows, width], tl.float32)
    for step in range(top_k * (block_size // key_tile)):
        block = tl.load(ids + step // (block_size // key_tile))
        start = block * block_size + step % (block_size // key_tile) * key_tile
        seen = (start + key <= slot) & (block >= 0)
        mask = seen[:, None] & (dim < head_dim)[None, :]
        base = (first_key + start.to(tl.int64) * groups) * head_dim
        k_tile = tl.load(k + base + key_offsets, mask=mask, other=0.0)
        v_tile = tl.load(v + base + key_offsets, mask=mask, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * _LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, axis=1)
        out = out * decay[:, None]
        out = tl.dot(weights.to(v_tile.dtype), v_tile, out, input_precision="ieee")
        top = new_top
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    tl.store(o + place * heads * head_dim + tile, out.to(o.dtype.element_ty), mask=inside)
    result = top / _LOG2_E + tl.log(tl.where(empty, 1.0, total))
    tl.store(lse + place * heads + head, result, mask=head < heads)
