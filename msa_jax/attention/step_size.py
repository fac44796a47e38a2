"""Step sizes that depend on the input, and the decay that they make (Mamba-2, Gated DeltaNet)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from msa_jax.attention.chunks import wide
from msa_jax.sharding import weight

# Initial ranges of Mamba-2 (arXiv 2405.21060), which Gated DeltaNet took over.
_STEPS = (1e-3, 1e-1)
_RATES = (1.0, 16.0)


class StepSize(nnx.Module):
    """Per head: step = softplus(x + bias), and the log of the decay, -exp(log_rate) * step.

    At first steps are spread evenly over their logarithms from 0.001 to 0.1, rates evenly from 1
    to 16, so that heads forget within a few tokens up to within a thousand.

    Args:
      num_heads: of the layer.
      param_dtype: of the parameters.
      rngs: for the initial values.
    """

    def __init__(self, num_heads: int, *, param_dtype: str, rngs: nnx.Rngs):
        def parameter(value):
            return nnx.Param(value.astype(param_dtype), logical_axes=("heads",))

        shape, bounds = (num_heads,), [math.log(bound) for bound in _STEPS]
        step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, *bounds))
        rate = jax.random.uniform(rngs.params(), shape, jnp.float32, *_RATES)
        # softplus(bias) = step.
        self.bias = parameter(step + jnp.log(-jnp.expm1(-step)))
        self.log_rate = parameter(jnp.log(rate))

    def __call__(
        self, x: Float[Array, "B T H"]
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Step sizes and the logs of the decays, in float32 (float64 for float64 inputs)."""
        dtype = wide(x)
        step = jax.nn.softplus(x.astype(dtype) + weight(self.bias, dtype))
        return step, -jnp.exp(weight(self.log_rate, dtype)) * step
