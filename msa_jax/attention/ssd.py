"""The selective state space of Mamba-2 (arXiv 2405.21060, section 6): in chunks, and by token.

Each head keeps a matrix S [P, N]. Token t lets it decay by a_t, adds its input x_t under b_t, and
reads it with c_t; b and c serve all heads:

    S_t = a_t S_{t-1} + x_t b_t^T
    y_t = S_t c_t

Within a chunk this is attention without softmax, its scores c_i . b_j times the decay between the
two tokens (state-space duality); between chunks only states are passed on.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from msa_jax.attention.chunks import (
    chunk_decays,
    find_documents,
    join_chunks,
    product_in,
    split_chunks,
    split_heads,
    wide,
    without_padding,
)
from pallas_kernels.residuals import OUTPUT

# Chunks whose states follow from each other in one product.
_GROUP = 128


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
    num_tokens = x.shape[1]
    size = min(chunk_size, num_tokens)
    documents = find_documents(segment_ids)
    log_decay = split_heads(without_padding(log_decay.astype(wide(x)), documents), size)
    x, c = (split_chunks(without_padding(a, documents), size) for a in (x, c))
    b = split_chunks(b, size)
    number = None if documents is None else split_chunks(documents.number, size, mode="edge")
    y, state = _in_chunks(x, b, c, log_decay, number, initial_state)
    return checkpoint_name(join_chunks(y, num_tokens), OUTPUT), state


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


@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(OUTPUT),
    prevent_cse=False,
)
def _in_chunks(x, b, c, log_decay, number, state):
    """Each token's output, and the state behind the last chunk; remade as in `delta_rule`."""
    product = partial(product_in(x.dtype), out=x.dtype)
    decays = chunk_decays(log_decay, number)
    to_end, from_start = (
        jnp.swapaxes(a, 2, 3)[..., None] for a in (decays.to_end, decays.from_start)
    )
    per_head = x.shape[3:]
    decayed = (to_end * x).reshape(*x.shape[:3], -1)
    written = product("bnjx,bnjs->bnxs", decayed, b)
    written = written.reshape(*x.shape[:2], *per_head, -1)
    number = None if number is None else number[..., -1]
    states, state = _pass_on(log_decay.sum(-1), written, number, state)
    states = states.reshape(*x.shape[:2], -1, states.shape[-1])
    earlier = from_start * product("bnis,bnxs->bnix", c, states).reshape(x.shape)
    scores = decays.between * product("bnis,bnjs->bnij", c, b, out=wide(x))[:, :, None]
    y = product("bnhij,bnhjp->bnhip", scores, jnp.swapaxes(x, 2, 3))
    return (jnp.swapaxes(y, 2, 3) + earlier).astype(x.dtype), state


def _pass_on(log_decay, written, number, state):
    """The state before each chunk [B, N, H, P, S], and the one behind the last.

    A sum over all chunks before, as over the tokens of a chunk: groups of chunks are to chunks what
    chunks are to tokens, and the states between groups follow in the same way.

    Args:
      log_decay: of each chunk [B, N, H].
      written: what each chunk leaves in the state [B, N, H, P, S].
      number: of the document at each chunk's end [B, N]; None if there is one.
      state: before the first chunk [B, H, P, S]; None for 0.
    """
    product = product_in(written.dtype)
    num_chunks = written.shape[1]
    size = min(num_chunks, _GROUP)
    log_decay = jnp.swapaxes(split_chunks(log_decay, size), 2, 3)
    number = None if number is None else split_chunks(number, size, mode="edge")
    written = checkpoint_name(jnp.swapaxes(split_chunks(written, size), 2, 3), OUTPUT)
    decays = chunk_decays(log_decay, number, long=True)
    earlier = jnp.pad(decays.between, [(0, 0)] * 3 + [(1, 0), (0, 0)])[..., :-1, :]
    shape, flat = written.shape, written.reshape(*written.shape[:4], -1)
    states = product("bghij,bghjx->bghix", earlier, flat, out=written.dtype).reshape(shape)
    states = jnp.swapaxes(states, 2, 3)
    last = product("bghj,bghjx->bghx", decays.to_end, flat).reshape(*shape[:3], *shape[4:])
    if last.shape[1] > 1:
        number = None if number is None else number[..., -1]
        before, last = _pass_on(log_decay.sum(-1), last, number, state)
    else:
        before, last = state, last[:, 0]
        if state is not None:
            last, before = decays.whole[:, 0, :, None, None] * state + last, state[:, None]
    if before is not None:
        since = jnp.pad(decays.from_start, [(0, 0)] * 3 + [(1, 0)], constant_values=1)[..., :-1]
        states = states + jnp.swapaxes(since, 2, 3)[..., None, None] * before[:, :, None]
    return join_chunks(states, num_chunks), last
