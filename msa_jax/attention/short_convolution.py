"""The short causal convolution in front of the recurrent mixers, each channel by itself."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from msa_jax.attention.chunks import Documents, wide, without_padding
from msa_jax.sharding import weight


class ShortConvolution(nnx.Module):
    """The parameters of `short_convolution`, with PyTorch's initial values for such a layer.

    Args:
      shape: of the channels.
      axes: their logical axes.
      width: tokens seen, the newest among them.
      bias: whether there is one.
      param_dtype: of the parameters.
      rngs: for the initial values.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        width: int,
        *,
        bias: bool,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)

        def uniform(shape, axes):
            value = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
            return nnx.Param(value.astype(param_dtype), logical_axes=axes)

        self.kernel = uniform((width, *shape), (None, *axes))
        # One axis, named by the first of the channels': what has two is a matrix and decays.
        self.bias = uniform((math.prod(shape),), axes[:1]) if bias else None
        self.shape = shape

    def arrays(self, dtype: str) -> tuple[Array, Array | None]:
        """Kernel and bias, ready to use."""
        bias = None if self.bias is None else weight(self.bias, dtype).reshape(self.shape)
        return weight(self.kernel, dtype), bias


def short_convolution(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "W *C"],
    bias: Float[Array, "*C"] | None,
    documents: Documents | None,
    tail: Float[Array, "B W-1 *C"] | None = None,
) -> tuple[Float[Array, "B T *C"], Float[Array, "B W-1 *C"]]:
    """silu of a sum over each token and the W - 1 before it in its document.

    Args:
      x: inputs.
      kernel: the newest token's weights last.
      bias: added to the sum.
      documents: of the tokens; None for one document per row.
      tail: the last W - 1 inputs before these, of document 0; zeros by default.

    Returns:
      The outputs in x's dtype, and the inputs of the row's last W - 1 real tokens, for rows whose
      padding is all behind them.
    """
    shape, num_tokens, before = x.shape, x.shape[1], kernel.shape[0] - 1
    x = without_padding(x, documents)
    if tail is None:
        tail = jnp.zeros((shape[0], before, *shape[2:]), x.dtype)
    inputs = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    tail, number = inputs[:, num_tokens:], None
    if documents is not None:
        last = jax.vmap(lambda row, count: jax.lax.dynamic_slice_in_dim(row, count, before))
        tail = last(inputs, documents.real.sum(1))
        number = jnp.pad(documents.number, ((0, 0), (before, 0)))[..., None]
    # With one axis of channels: of two, XLA lays out gradients with the tokens last, by copies.
    inputs = inputs.reshape(*inputs.shape[:2], -1)
    kernel = kernel.reshape(len(kernel), -1).astype(wide(x))
    total = jnp.zeros((), wide(x)) if bias is None else bias.reshape(-1).astype(wide(x))
    for place, taps in enumerate(kernel):
        seen = inputs[:, place : place + num_tokens]
        if number is not None:
            own = number[:, place : place + num_tokens] == number[:, before:]
            seen = jnp.where(own, seen, 0)
        total = total + seen * taps
    total = _with_cotangent_in(total, x.dtype)
    return jax.nn.silu(total).astype(x.dtype).reshape(shape), tail


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_cotangent_in(array: Array, dtype: jnp.dtype) -> Array:
    """The array, whose cotangent is rounded to `dtype`, and read as such by all who need it."""
    return array


def _cotangent(dtype, _, cotangent):
    return (jax.lax.optimization_barrier(cotangent.astype(dtype)).astype(cotangent.dtype),)


_with_cotangent_in.defvjp(lambda array, dtype: (array, None), _cotangent)
