"""Gated feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from msa_jax.config import Activation
from msa_jax.nn.param import matrix
from msa_jax.sharding import project

# gpt-oss style gate, as in MiniMax M3.
_OAI_SLOPE = 1.702
_OAI_LIMIT = 7.0


def gated(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], activation: Activation
) -> Float[Array, "*batch F"]:
    """The gated activation: silu(gate) * up, or M3's clamped form with (up + 1)."""
    if activation == "swiglu":
        return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, _OAI_LIMIT)
    up = jnp.clip(up, -_OAI_LIMIT, _OAI_LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(_OAI_SLOPE * gate)


class FeedForward(nnx.Module):
    """down(activation(gate(x), up(x))), without biases.

    Args:
      d_model: width of x.
      ffn_dim: inner width.
      activation: see `gated`.
      dtype: of the matmuls.
      param_dtype: of the weights.
      output_scale: factor on the output matrix's initial deviation.
      rngs: for the initial values.
    """

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        *,
        activation: Activation = "swiglu",
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        inward = {"fan_in": d_model, "dtype": param_dtype}
        self.gate = matrix(rngs, (d_model, ffn_dim), ("embed", "mlp"), **inward)
        self.up = matrix(rngs, (d_model, ffn_dim), ("embed", "mlp"), **inward)
        self.down = matrix(
            rngs,
            (ffn_dim, d_model),
            ("mlp", "embed"),
            fan_in=ffn_dim,
            dtype=param_dtype,
            scale=output_scale,
        )
        self.activation: Activation = activation
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        """The layer's output, in x's dtype."""
        gate = project("btm,mf->btf", x, self.gate, self.dtype, "batch", "sequence", "mlp")
        up = project("btm,mf->btf", x, self.up, self.dtype, "batch", "sequence", "mlp")
        hidden = gated(gate, up, self.activation)
        y = project("btf,fm->btm", hidden, self.down, self.dtype, "batch", "sequence", None)
        return y.astype(x.dtype)
