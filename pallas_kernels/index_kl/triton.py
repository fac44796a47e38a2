"""`index_kl` by Triton on NVIDIA GPUs from Ampere on: what it serves, and its gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.sparse_attention.triton import check_group
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.triton import check_served, current_target
from pallas_kernels.visibility import visible_block_ids


class _Options(NamedTuple):
    """What is known while tracing."""

    block_size: int
    scale: float
    index_scale: float


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
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """KL(teacher || student) and the student's log-sum-exp per query and group, in nats.

    Only index_q and index_k have gradients, which are the same bits in every run.

    Args:
      q: bfloat16, float16 or float32, of up to 256 dims, at most 128 heads per group.
      k: main keys.
      index_q: index queries, in q's dtype.
      index_k: index keys.
      block_ids: the support's blocks.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      main_lse: log-sum-exp of the main scores over the support, as `sparse_attention` returns it;
        None to compute it here.
      block_size: a power of two from 16 on.
      scale: of the main scores.
      index_scale: of the index scores.

    Raises:
      NotImplementedError: no such GPU, no jax-triton, no selection, or arguments other than the
        above.
    """
    current_target()
    if block_ids is None:
        raise NotImplementedError(
            "the Triton kernels go through selected blocks, there is no selection"
        )
    refuse_varying(q, k, index_q, index_k, block_ids, segment_ids, query_offset, main_lse)
    check_served(block_size, q=q, k=k, index_q=index_q, index_k=index_k)
    check_group(q, k)
    options = _Options(block_size, float(scale), float(index_scale))
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    q, k, main_lse = jax.lax.stop_gradient((q, k, main_lse))
    return _align(options, index_q, index_k, q, k, block_ids, segment_ids, offsets, main_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(options: _Options, *arrays):
    return _forward(options, *arrays)[0]


@in_32_bits
def _forward(options: _Options, index_q, index_k, q, k, block_ids, segment_ids, offsets, main_lse):
    """Results, and what the backward pass needs."""
    from pallas_kernels.index_kl.index_kl_triton import divergence
    from pallas_kernels.sparse_attention.forward_triton import forward

    block_size = options.block_size
    ids = visible_block_ids(block_ids, segment_ids, offsets, block_size)
    if main_lse is None:
        _, lse = forward(q, k, k, ids, offsets, block_size=block_size, scale=options.scale)
    else:
        lse = main_lse.swapaxes(1, 2)
    kl, index_lse = divergence(q, k, index_q, index_k, ids, offsets, lse, **options._asdict())
    return (kl, index_lse), (q, k, index_q, index_k, ids, offsets, lse, index_lse)


@in_32_bits
def _backward(options: _Options, kept, cotangents):
    from pallas_kernels.index_kl.gradient_triton import gradients

    d_kl, _ = cotangents  # the log-sum-exp is a constant to callers
    d_index_q, d_index_k = gradients(*kept, d_kl=d_kl, **options._asdict())
    return d_index_q, d_index_k, None, None, None, None, None, None


_align.defvjp(_forward, _backward)
