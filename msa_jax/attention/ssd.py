"""The selective state space of Mamba-2 (arXiv 2405.21060, section 6): in chunks, and by token.

Each head keeps a matrix S [P, N]. Token t lets it decay by a_t, adds its input x_t under b_t, and
reads it with c_t; b and c serve all heads:

    S_t = a_t S_{t-1} + x_t b_t^T
    y_t = S_t c_t

Within a chunk this is attention without softmax, its scores c_i . b_j times the decay between the
two tokens (state-space duality); between chunks only states are passed on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from msa_jax.attention.chunks import (
    chunk_decays,
    find_documents,
    join_heads,
    pass_on,
    product_in,
    split_chunks,
    split_heads,
    wide,
)


def state_space(
    x: Float[Array, "B T H P"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    log_decay: Float[Array, "B T H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    chunk_size: int = 128,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H P N"]]:
    """All tokens of a sequence, in chunks.

    Args:
      x: inputs, times their step sizes.
      b: where the state takes an input in.
      c: what is read of the state.
      log_decay: natural log of a, <= 0.
      segment_ids: document of each token, 0 for padding, which leaves the state alone and gets 0;
        None for one document per row. A state begins anew with each document.
      initial_state: what the tokens of the first document find; 0 by default.
      chunk_size: tokens per chunk.

    Returns:
      The output in x's dtype, and the state behind the last token in float32 (float64 for float64).
    """
    batch, num_tokens, heads, head_dim = x.shape
    size = min(chunk_size, num_tokens)
    number, real = find_documents(segment_ids, batch, num_tokens)
    accumulator = wide(x)
    state = jnp.zeros((batch, heads, head_dim, b.shape[-1]), accumulator)
    if initial_state is not None:
        state = initial_state.astype(accumulator)
    log_decay = split_heads(jnp.where(real[..., None], log_decay.astype(accumulator), 0), size)
    number = split_chunks(number, size, mode="edge")
    x = split_heads(jnp.where(real[..., None, None], x, 0), size)
    b = split_chunks(b, size)
    c = split_chunks(jnp.where(real[..., None], c, 0), size)

    written, whole = jax.checkpoint(_write)(x, b, log_decay, number)
    states, state = pass_on(whole[..., None, None], written, state, jnp.multiply)
    y = jax.checkpoint(_read)(x, b, c, states, log_decay, number)
    return join_heads(y, num_tokens).astype(x.dtype), state


def state_space_step(
    state: Float[Array, "B H P N"],
    x: Float[Array, "B H P"],
    b: Float[Array, "B N"],
    c: Float[Array, "B N"],
    log_decay: Float[Array, "B H"],
) -> tuple[Float[Array, "B H P"], Float[Array, "B H P N"]]:
    """One token of each row: its output and the new state, in the state's dtype."""
    x, b, c, log_decay = (a.astype(state.dtype) for a in (x, b, c, log_decay))
    state = jnp.exp(log_decay)[..., None, None] * state + x[..., None] * b[:, None, None]
    return product_in(state.dtype)("bhpn,bn->bhp", state, c), state


def _write(x, b, log_decay, number):
    """What each chunk's tokens leave behind it, and the whole chunk's decay."""
    decays = chunk_decays(log_decay, number)
    decayed = decays.to_end[..., None] * x
    return product_in(x.dtype)("nbhip,nbis->nbhps", decayed, b), decays.whole


def _read(x, b, c, states, log_decay, number):
    """Each token's output: from the state before its chunk, and from the chunk's own tokens."""
    product = product_in(x.dtype)
    decays = chunk_decays(log_decay, number)
    scores = decays.between * product("nbis,nbjs->nbij", c, b)[:, :, None]
    earlier = decays.from_start[..., None] * product("nbis,nbhps->nbhip", c, states)
    return earlier + product("nbhij,nbhjp->nbhip", scores, x)
