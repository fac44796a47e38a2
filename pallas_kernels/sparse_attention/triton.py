"""`sparse_attention` by Triton on NVIDIA GPUs from Ampere on: what it serves, and its gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.residuals import named
from pallas_kernels.tracing import in_32_bits, refuse_varying
from pallas_kernels.triton import check_served, current_target
from pallas_kernels.visibility import visible_block_ids

# The heads of a group are the rows of a program's matrix products.
MAX_GROUP = 128


class _Options(NamedTuple):
    """What is known while tracing."""

    block_size: int
    scale: float


def sparse_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over the visible tokens of the selected blocks: output and log-sum-exp.

    Gradients are kernels too, and the same bits in every run.

    Args:
      q: bfloat16, float16 or float32, of up to 256 dims.
      k: keys, at most 128 query heads each.
      v: values.
      block_ids: any number per query.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      block_size: a power of two from 16 on.
      scale: of the scores.

    Raises:
      NotImplementedError: no such GPU, no jax-triton, or arguments other than the above.
    """
    current_target()
    refuse_varying(q, k, v, block_ids, segment_ids, query_offset)
    check_served(block_size, q=q, k=k, v=v)
    check_group(q, k)
    options = _Options(block_size, float(scale))
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), q.shape[:1])
    return _attention(options, q, k, v, block_ids, segment_ids, offsets)


def check_group(q: Array, k: Array) -> None:
    """Raises NotImplementedError for more query heads per KV head than a program has rows for."""
    if q.shape[2] // k.shape[2] > MAX_GROUP:
        raise NotImplementedError(
            f"Triton kernels take at most {MAX_GROUP} query heads per KV head, not "
            f"{q.shape[2] // k.shape[2]}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q, k, v, block_ids, segment_ids, offsets):
    return _forward(options, q, k, v, block_ids, segment_ids, offsets)[0]


def _forward(options: _Options, q, k, v, block_ids, segment_ids, offsets):
    return _attend(options, q, k, v, block_ids, segment_ids, offsets)


@in_32_bits
def _attend(options: _Options, q, k, v, block_ids, segment_ids, offsets):
    """Results, and what the backward pass needs."""
    from pallas_kernels.sparse_attention.forward_triton import forward

    ids = visible_block_ids(block_ids, segment_ids, offsets, options.block_size)
    o, lse = forward(q, k, v, ids, offsets, **options._asdict())
    o, lse = named(o, lse.swapaxes(1, 2))
    return (o, lse), (q, k, v, ids, offsets, o, lse)


@in_32_bits
def _backward(options: _Options, kept, cotangents):
    from pallas_kernels.sparse_attention.backward_triton import backward

    q, k, v, ids, offsets, o, lse = kept
    do, d_lse = cotangents
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    delta -= d_lse.swapaxes(1, 2)
    lse = lse.swapaxes(1, 2)
    gradients = backward(q, k, v, ids, offsets, lse, do, delta, **options._asdict())
    return *gradients, None, None, None


_attention.defvjp(_forward, _backward)
