"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, Eq. 10): in chunks, and token by token.

Each head keeps a matrix S [Dk, Dv] that maps keys to values. Token t lets it decay by a_t, replaces
the share beta_t of what it finds under its key by its own value, and reads it with its query:

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = S_t^T q_t

Written as S_t = a_t S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - a_t S_{t-1}^T k_t), the u of a
chunk solve a unit lower triangular system, whose right side is linear in the state before the
chunk (the WY form of the paper's section 3.3). So is the state behind the chunk, in which all
chunks are solved at once.
"""

from functools import partial

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


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """All tokens of a sequence, in chunks.

    Args:
      q: queries.
      k: keys, of length 1 or less: longer ones make the state grow.
      v: values.
      log_decay: natural log of a, <= 0.
      beta: share of the old value that is replaced, 0 to 1.
      segment_ids: document of each token, 0 for padding, which leaves the state alone and gets 0;
        None for one document per row. A state begins anew with each document.
      initial_state: what the tokens of the first document find; 0 by default.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      The output in q's dtype, and the state behind the last token in float32 (float64 for float64).
    """
    batch, num_tokens, heads, key_dim = q.shape
    size = min(chunk_size, 1 << (num_tokens - 1).bit_length())
    number, real = find_documents(segment_ids, batch, num_tokens)
    accumulator = wide(q)
    state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), accumulator)
    if initial_state is not None:
        state = initial_state.astype(accumulator)
    log_decay, beta = (
        split_heads(jnp.where(real[..., None], gate.astype(accumulator), 0), size)
        for gate in (log_decay, beta)
    )
    number = split_chunks(number, size, mode="edge")
    q = split_heads(jnp.where(real[..., None, None], q, 0), size)
    k, v = split_heads(k, size), split_heads(v, size)

    w, u, transition, written = jax.checkpoint(_solve)(k, v, log_decay, beta, number)
    states, state = pass_on(transition, written, state, partial(jnp.matmul, precision="highest"))
    o = jax.checkpoint(_read)(q, k, u, w, states, log_decay, number)
    return join_heads(o, num_tokens).astype(q.dtype), state


def delta_rule_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    log_decay: Float[Array, "B H"],
    beta: Float[Array, "B H"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of each row: its output and the new state, in the state's dtype."""
    q, k, v, log_decay, beta = (a.astype(state.dtype) for a in (q, k, v, log_decay, beta))
    product = product_in(state.dtype)
    state = jnp.exp(log_decay)[..., None, None] * state
    u = beta[..., None] * (v - product("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * u[..., None, :]
    return product("bhkv,bhk->bhv", state, q), state


def _solve(k, v, log_decay, beta, number):
    """Each chunk's system solved: w and u of u_t = u - w S, S the state before the chunk.

    Returns also what the chunk makes of that state: transition S + written.
    """
    product = product_in(k.dtype)
    decays = chunk_decays(log_decay, number)
    overlap = product("nbhik,nbhjk->nbhij", k, k)
    system = jnp.tril(beta[..., None] * decays.between * overlap, -1)
    inverse = inverse_of_unit_lower(system)
    w = product("nbhij,nbhjk->nbhik", inverse, (beta * decays.from_start)[..., None] * k)
    u = product("nbhij,nbhjv->nbhiv", inverse, beta[..., None] * v)
    k_end = decays.to_end[..., None] * k
    kept = decays.whole[..., None, None] * jnp.eye(k.shape[-1], dtype=u.dtype)
    transition = kept - product("nbhik,nbhij->nbhkj", k_end, w)
    return w.astype(k.dtype), u, transition, product("nbhik,nbhiv->nbhkv", k_end, u)


def _read(q, k, u, w, states, log_decay, number):
    """Each token's output: from the state before its chunk, and from the chunk's own tokens."""
    product = product_in(q.dtype)
    decays = chunk_decays(log_decay, number)
    scores = decays.between * product("nbhik,nbhjk->nbhij", q, k)
    earlier = decays.from_start[..., None] * product("nbhik,nbhkv->nbhiv", q, states)
    u = u - product("nbhik,nbhkv->nbhiv", w, states)
    return earlier + product("nbhij,nbhjv->nbhiv", scores, u)


@jax.custom_vjp
def inverse_of_unit_lower(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + L)^-1 of strictly lower triangular L, whose size is a power of two.

    By halves, [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: matrix products alone, as
    stable as substitution. (The product of I + (-L)^(2^n) is not: the powers can outgrow float32.)
    """
    return _inverse(lower)


def _inverse(lower):
    half = lower.shape[-1] // 2
    if half == 0:
        return jnp.ones_like(lower)
    diagonal = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], axis=-3)
    inverses = _inverse(diagonal)
    first, second = inverses[..., 0, :, :], inverses[..., 1, :, :]
    corner = -_matmul(_matmul(second, lower[..., half:, :half]), first)
    upper = jnp.concatenate([first, jnp.zeros_like(corner)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _matmul(a: Array, b: Array) -> Array:
    # Sums over few terms are faster without a matrix product (1024 matrices of 64 x 64 inverted on
    # 2 CPU cores: 91 ms with products alone, 12 ms like this; a triangular solve takes 212 ms).
    if a.shape[-1] <= 16:
        return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
    return jnp.matmul(a, b, precision="highest")


def _inverse_forward(lower):
    inverse = _inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    """d(A^-1) = -A^-1 dA A^-1."""
    transposed = inverse.mT
    return (-jnp.tril(_matmul(_matmul(transposed, cotangent), transposed), -1),)


inverse_of_unit_lower.defvjp(_inverse_forward, _inverse_backward)
