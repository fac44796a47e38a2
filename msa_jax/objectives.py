"""The training objective: next-token loss, KL alignment of the index branch, expert balance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of every target, nats; works with the vocabulary split over devices."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return log_total - jnp.where(hit, logits, 0).sum(-1)


def alignment_loss(aux: dict[str, Array], reduction: str) -> Float[Array, ""]:
    """The KL terms of all layers with an index branch, summed or averaged; 0 without any."""
    if "index_kl" not in aux:
        return jnp.zeros(())
    return aux["index_kl"].sum() if reduction == "sum" else aux["index_kl"].mean()


def balance_loss(aux: dict[str, Array]) -> Float[Array, ""]:
    """Mean load-balance loss of the softmax-routed layers; 0 without any."""
    return aux["balance_loss"].mean() if "balance_loss" in aux else jnp.zeros(())
