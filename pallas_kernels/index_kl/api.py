"""`index_kl`: the loss that teaches the index branch to imitate the main branch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_heads,
    check_index,
    check_index_fits,
    check_segments,
    check_selection,
    check_slots,
)
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.index_kl import mosaic_gpu, mosaic_tpu, reference, triton
from pallas_kernels.selection import BlockSelection
from pallas_kernels.sharding import shard_over_batch_heads_and_queries


def _summed(align: Callable) -> Callable:
    """An implementation that differentiates each query's divergence, as one of their sum."""

    def run(*arrays, **options):
        *arrays, weights = arrays
        kl, index_lse = align(*arrays, **options)
        return (weights.astype(kl.dtype) * kl).sum(), kl, index_lse

    return run


IMPLEMENTATIONS = {
    "mosaic_tpu": _summed(mosaic_tpu.index_kl),
    "mosaic_gpu": mosaic_gpu.index_kl,
    "triton": _summed(triton.index_kl),
    "reference": _summed(reference.index_kl),
}


class IndexKL(NamedTuple):
    """What `index_kl` returns, in nats.

    Attributes:
      loss: sum of `weights * kl`, the one result that has gradients.
      kl: per query and group, 0 for padding; a constant.
      index_lse: the student's log-sum-exp over the support, -inf for padding; a constant.
    """

    loss: Float[Array, ""]
    kl: Float[Array, "B Hkv T"]
    index_lse: Float[Array, "B Hkv T"]


def index_kl(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    selection: BlockSelection | None = None,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
    main_lse: Float[Array, "B Hq T"] | None = None,
    weights: Float[Array, "B Hkv T"] | None = None,
    implementation: Implementation = None,
) -> IndexKL:
    """KL(teacher || student) per query and KV group, over token probabilities (arXiv 2606.13392).

    The support is the visible tokens of the selected blocks, or everything visible without a
    selection (dense warm-up). Teacher: softmax of the main scores per head, then the mean over the
    group's heads. Student: softmax of the index scores. The teacher is a constant: the only
    gradients are those of `loss` by index_q and index_k, weight * (student - teacher) per score.
    Kernels make them together with the value, since the weights are known then.

    Args:
      q: main queries.
      k: main keys.
      index_q: index queries.
      index_k: index keys.
      selection: the support's blocks; None for the whole causal prefix.
      scale: of the main scores, 1 / sqrt(D) by default.
      index_scale: of the index scores, 1 / sqrt(Di) by default.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      main_lse: natural log-sum-exp of the main scores over the same support, as `sparse_attention`
        or `dense_attention` returns it. The kernels need it, the reference computes its own.
      weights: of the sum, constants; by default those of the mean over all queries and groups.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      The loss, its terms and the student's log-sum-exp, all float32.

    Raises:
      ValueError: shapes that differ, or a document off a block boundary.
    """
    check_heads(q, k)
    per_query = q.shape[0], k.shape[2], q.shape[1]
    _check_shape("main_lse", main_lse, (q.shape[0], q.shape[2], q.shape[1]), "[B, Hq, T]")
    _check_shape("weights", weights, per_query, "[B, Hkv, T]")
    check_index(index_q, index_k)
    check_index_fits(index_q, index_k, q, k)
    check_slots(q, k, segment_ids, query_offset)
    block_ids, block_size = None, 1
    if selection is not None:
        block_ids, block_size = selection.block_ids, selection.block_size
        check_selection(block_ids, q, k)
        check_segments(segment_ids, block_size)
    run = dispatch("index_kl", IMPLEMENTATIONS, implementation)

    share = 1 / math.prod(per_query)

    def local(*arrays):
        *arrays, weights = arrays
        if weights is None:
            batch, num_queries = arrays[0].shape[:2]
            weights = jnp.full((batch, arrays[1].shape[2], num_queries), share, jnp.float32)
        loss, *terms = run(
            *arrays,
            jax.lax.stop_gradient(weights),
            block_size=block_size,
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            index_scale=1 / math.sqrt(index_q.shape[-1]) if index_scale is None else index_scale,
        )
        # A part of the sum for each device.
        return loss.reshape(1, 1, 1), *jax.lax.stop_gradient(terms)

    layouts = ("bqh.", "b.h.", "bqh.", "b..", "bhq.", "b.", "o", "bhq", "bhq")
    sharded = shard_over_batch_heads_and_queries(local, layouts, ("bhq",) * 3)
    place = block_ids, segment_ids, query_offset
    parts, *terms = sharded(q, k, index_q, index_k, *place, main_lse, weights)
    return IndexKL(parts.sum(), *terms)


def _check_shape(name: str, array, expected: tuple[int, ...], letters: str) -> None:
    """Raises ValueError if an array that may be None is not that of these queries and heads."""
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {letters} = {expected}")
