"""RMSNorm with gain (1 + w)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from msa_jax.nn.param import gain


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with gain (1 + w), computed in float32.

    Zero is the neutral gain, so weight decay and a fresh start pull toward the plain norm. MiniMax
    M3 uses it for layers and, per head, for queries and keys.

    Args:
      size: of the last axis.
      eps: added to the mean square.
      param_dtype: of the gain.
    """

    def __init__(self, size: int, *, eps: float = 1e-6, param_dtype: str = "float32"):
        self.weight = gain(size, param_dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The normed array, in x's dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * (1 + self.weight[...].astype(wide.dtype))).astype(x.dtype)
