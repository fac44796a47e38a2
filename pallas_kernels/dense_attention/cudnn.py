"""cuDNN's flash attention through `jax.nn.dot_product_attention`, with its log-sum-exp in float32.

jax's function returns the log-sum-exp rounded to the output's dtype, but its backward pass keeps it
as cuDNN wrote it: it is taken from there, the residuals of `jax.vjp`, so that the forward pass, the
alignment loss and the backward pass share one call.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from pallas_kernels.residuals import named


def dense_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    *,
    window: int,
    scale: float,
    return_lse: bool,
) -> tuple[Float[Array, "..."], ...]:
    """Causal attention in one cuDNN call; what that call has no argument for is refused."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"cuDNN needs a CUDA device, this is {jax.default_backend()!r}")
    if segment_ids is not None:
        raise NotImplementedError("packed documents would need an explicit mask, which is slow")
    if not (isinstance(query_offset, int) and query_offset == 0 and q.shape[1] == k.shape[1]):
        raise NotImplementedError("cuDNN's causal mask aligns the first query with the first key")
    if q.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"cuDNN attention takes bfloat16 or float16, not {q.dtype}")
    if q.shape[3] % 8 or q.shape[3] > 128:
        raise NotImplementedError(f"head_dim={q.shape[3]} is not a multiple of 8 up to 128")
    o, lse = _differentiable(window, scale)(q, k, v)
    return (o, lse) if return_lse else (o,)


def _differentiable(window: int, scale: float) -> Callable:
    """(q, k, v) to output and log-sum-exp, both with gradients."""
    attend = functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )

    @jax.custom_vjp
    def attention(q, k, v):
        return _with_log_sum_exp(attend, q, k, v)[:2]

    def forward(q, k, v):
        o, lse, pullback = _with_log_sum_exp(attend, q.value, k.value, v.value)
        return (o, lse), (q.value, k.value, pullback)

    def backward(residuals, cotangents):
        q, k, pullback = residuals
        d_o, d_lse = cotangents
        if isinstance(d_o, SymbolicZero):
            d_o = jnp.zeros_like(q)
        gradients = pullback(d_o)
        if isinstance(d_lse, SymbolicZero):
            return gradients
        return _add_log_sum_exp_gradients(attend, scale, q, k, gradients, d_lse)

    attention.defvjp(forward, backward, symbolic_zeros=True)
    return attention


def _with_log_sum_exp(attend: Callable, q, k, v) -> tuple[Array, Array, Callable]:
    """Output, log-sum-exp and pullback; the pullback reads the first two under their names."""
    o, pullback = jax.vjp(attend, q, k, v)
    leaves, tree = jax.tree.flatten(pullback)
    batch, num_queries, num_heads, _ = q.shape
    expected = (batch, num_heads, num_queries), jnp.float32
    places = [i for i, leaf in enumerate(leaves) if (leaf.shape, leaf.dtype) == expected]
    if len(places) != 1:
        raise NotImplementedError("this jax keeps no float32 log-sum-exp of cuDNN's for itself")
    (place,) = places
    output, lse = named(o, leaves[place])
    leaves = [output if leaf is o else leaf for leaf in leaves]
    leaves[place] = lse
    return output, lse, jax.tree.unflatten(tree, leaves)


def _add_log_sum_exp_gradients(attend: Callable, scale: float, q, k, gradients, d_lse):
    """Adds what the log-sum-exp's cotangent says about q and k, at the price of a second pass.

    The log-sum-exp's gradient by a score is its probability P, so dq = scale dlse (P k), and dk =
    scale Pᵀ (dlse q). Attention with the keys as values gives the first; the second is what its
    values' gradient is where the output's is dlse q.
    """
    weights = scale * d_lse.swapaxes(1, 2)[..., None]
    mean_key, pullback = jax.vjp(functools.partial(attend, q, k), k)
    (d_k,) = pullback((weights * q).astype(q.dtype))
    d_q = (weights * mean_key).astype(q.dtype)
    return gradients[0] + d_q, gradients[1] + d_k, gradients[2]
