"""Names for what the backward pass of an attention op would rather keep than compute again.

`jax.checkpoint` forgets everything but what its policy names. An op names its results itself, in
the forward rule of its `custom_vjp` where it has one: only then is what the policy keeps also what
the backward rule reads.
"""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

OUTPUT, LOG_SUM_EXP = "attention_out", "attention_lse"

# Of the KL by index queries and keys, where the forward pass makes them.
INDEX_GRADIENTS = "index_kl_gradients"


def named(
    o: Float[Array, "B T Hq D"], lse: Float[Array, "B Hq T"]
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """An attention op's output and log-sum-exp under the names that a policy can keep."""
    return checkpoint_name(o, OUTPUT), checkpoint_name(lse, LOG_SUM_EXP)
