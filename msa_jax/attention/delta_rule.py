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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from msa_jax.attention.chunks import (
    chunk_decays,
    find_documents,
    join_chunks,
    join_heads,
    product_in,
    split_chunks,
    split_heads,
    wide,
    without_padding,
)
from pallas_kernels.residuals import OUTPUT

# Chunks of which each takes the state from the one before.
_GROUP = 4


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
    documents = find_documents(segment_ids)
    state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), wide(q))
    if initial_state is not None:
        state = initial_state.astype(wide(q))
    log_decay, beta = (
        split_heads(without_padding(gate.astype(wide(q)), documents), size)
        for gate in (log_decay, beta)
    )
    number = None if documents is None else split_chunks(documents.number, size, mode="edge")
    q, k, v = (split_heads(a, size) for a in (without_padding(q, documents), k, v))
    o, state = _in_chunks(q, k, v, log_decay, beta, number, state)
    return checkpoint_name(join_heads(o, num_tokens), OUTPUT), state


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


@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(OUTPUT),
    prevent_cse=False,
)
def _in_chunks(q, k, v, log_decay, beta, number, state):
    """Each token's output, and the state behind the last chunk.

    The backward pass computes all but the named again, for the arrays between are many and as large
    as q. Nothing keeps XLA from merging that with the forward pass where both are in one program:
    in a scan over layers they are not, and the barriers against it would keep fusions apart.
    """
    product = product_in(k.dtype)
    decays = chunk_decays(log_decay, number)
    overlap = product("bnhik,bnhjk->bnhij", k, k)
    system = jnp.tril(beta[..., None] * decays.between * overlap, -1)
    inverse = inverse_of_unit_lower(jax.lax.stop_gradient(system)).astype(k.dtype)
    inverse, system = checkpoint_name(inverse, OUTPUT), system.astype(k.dtype)

    # What a chunk makes of the state before it: transition S + written.
    weights = _solve(system.mT, inverse.mT, (decays.to_end[..., None] * k).astype(k.dtype))
    weights = beta[..., None] * weights
    kept = decays.whole[..., None, None] * jnp.eye(k.shape[-1], dtype=wide(k))
    from_start = decays.from_start[..., None]
    transition = kept - product("bnhik,bnhij->bnhkj", from_start * weights, k)
    written = product("bnhik,bnhiv->bnhkv", weights, v)
    states, state = _pass_on(transition, written, state, k.dtype)

    u = beta[..., None] * (v - from_start * product("bnhik,bnhkv->bnhiv", k, states))
    u = _solve(system, inverse, u.astype(k.dtype))
    scores = decays.between * product("bnhik,bnhjk->bnhij", q, k)
    earlier = from_start * product("bnhik,bnhkv->bnhiv", q, states, out=q.dtype)
    o = earlier + product("bnhij,bnhjv->bnhiv", scores, u, out=q.dtype)
    return o.astype(q.dtype), state


@jax.custom_vjp
def _solve(system, inverse, right):
    """x of (I + system) x = right, given the inverse, which gets no gradient: the system does.

    That is one more solution and one product, where a gradient of the inverse would take four.
    """
    return product_in(right.dtype)("bnhij,bnhjv->bnhiv", inverse, right, out=right.dtype)


def _solve_forward(system, inverse, right):
    x = _solve(system, inverse, right)
    return x, (inverse, x)


def _solve_backward(residuals, cotangent):
    inverse, x = residuals
    right = _solve(None, inverse.mT, cotangent)
    system = product_in(x.dtype)("bnhiv,bnhjv->bnhij", -right, x, out=x.dtype)
    return system, jnp.zeros_like(inverse), right


_solve.defvjp(_solve_forward, _solve_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pass_on(transition, written, state, dtype):
    """The states before each chunk of S_n+1 = transition_n S_n + written_n, and the last one."""
    return _pass_on_forward(transition, written, state, dtype)[0]


def _pass_on_forward(transition, written, state, dtype):
    states, state = _recur(transition, written, state)
    states = checkpoint_name(states.astype(dtype), OUTPUT)
    return (states, state), (transition, states)


def _pass_on_backward(dtype, residuals, cotangents):
    """The same recurrence from behind, with every transition transposed."""
    transition, states = residuals
    of_states, of_last = cotangents
    of_states = of_states[:, ::-1].astype(of_last.dtype)
    of_written, of_state = _recur(transition[:, ::-1].mT, of_states, of_last)
    of_written = of_written[:, ::-1]
    of_transition = product_in(dtype)("bnhkv,bnhjv->bnhkj", of_written, states)
    return of_transition, of_written, of_state


_pass_on.defvjp(_pass_on_forward, _pass_on_backward)


def _recur(transition, written, state):
    """`_pass_on` in groups of chunks, and the states between groups by the same again.

    Chunk after chunk, a GPU would mostly wait for the start of so small products.
    """
    apply = partial(product_in(transition.dtype), "...ij,...jv->...iv")
    num_chunks = transition.shape[1]
    if num_chunks <= _GROUP:
        states = [state]
        for n in range(num_chunks):
            states.append(apply(transition[:, n], states[-1]) + written[:, n])
        return jnp.stack(states[:-1], axis=1), states[-1]
    transition, written = (split_chunks(a, _GROUP) for a in (transition, written))
    chunks = [(transition[:, :, n], written[:, :, n]) for n in range(_GROUP)]
    whole, left = chunks[0]
    for transition, written in chunks[1:]:
        whole, left = apply(transition, whole), apply(transition, left) + written
    state, last = _recur(whole, left, state)
    states = [state]
    for transition, written in chunks[:-1]:
        states.append(apply(transition, states[-1]) + written)
    states = jnp.stack(states, axis=2)
    states = join_chunks(states, states.shape[1] * _GROUP)
    # Chunks that fill up the last group forget everything, but for the state before the first.
    last = last if num_chunks == states.shape[1] else states[:, num_chunks]
    return states[:, :num_chunks], last


def inverse_of_unit_lower(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + L)^-1 of strictly lower triangular L, whose size is a power of two.

    By halves, [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]: matrix products alone, as
    stable as substitution. (The product of I + (-L)^(2^n) is not: the powers can outgrow float32.)
    """
    half = lower.shape[-1] // 2
    if half == 0:
        return jnp.ones_like(lower)
    diagonal = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], axis=-3)
    inverses = inverse_of_unit_lower(diagonal)
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
