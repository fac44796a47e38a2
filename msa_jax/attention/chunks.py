"""What the recurrent mixers share: documents, chunks of tokens, and decay inside a chunk.

A recurrent mixer keeps a state that decays, S_t = a_t S_{t-1} + (what token t writes). Computed in
chunks, only the states between chunks follow from each other; all else is matrix products over all
chunks at once, so that memory grows with the length and not with its square.

Decays are kept as logarithms, and a product of decays as a difference of running sums: none is ever
divided by another, and no exponent is above 0.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from msa_jax.config import ConfigError
from msa_jax.sharding import RULES, axis_names, explicit_axes


class Documents(NamedTuple):
    """Where a row's documents lie.

    Attributes:
      number: the document of each token, counted from 0 within the row; what a cache holds belongs
        to document 0. Padding has the number of the document before it.
      real: False for padding.
    """

    number: Int[Array, "B T"]
    real: Bool[Array, "B T"]


def find_documents(segment_ids: Int[Array, "B T"] | None, batch: int, num_tokens: int) -> Documents:
    """Documents by their segment ids, 0 for padding; None for one document per row."""
    if segment_ids is None:
        shape = (batch, num_tokens)
        return Documents(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    starts = (segment_ids[:, 1:] != segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    number = jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return Documents(number, segment_ids > 0)


def refuse_split_sequence(kind: str) -> None:
    """Raises ConfigError on a mesh that splits the tokens of a row: states go from each to all."""
    mesh = jax.sharding.get_abstract_mesh()
    for axis in axis_names(RULES.sequence):
        if axis in explicit_axes() and mesh.shape[axis] > 1:
            raise ConfigError(
                f"mesh.{axis}={mesh.shape[axis]}: attention.kind={kind!r} passes a state along the "
                f"whole row, which cannot be split; set mesh.{axis}=1"
            )


def split_chunks(array: Array, size: int, *, mode: str = "constant") -> Array:
    """[B, T, ...] to [N, B, size, ...], padded behind with zeros, or as `jnp.pad`'s `mode` does."""
    batch, num_tokens, *rest = array.shape
    num_chunks = -(-num_tokens // size)
    padding = [(0, 0), (0, num_chunks * size - num_tokens)] + [(0, 0)] * len(rest)
    padded = jnp.pad(array, padding, mode=mode)
    return jnp.moveaxis(padded.reshape(batch, num_chunks, size, *rest), 1, 0)


def split_heads(array: Array, size: int) -> Array:
    """[B, T, H, ...] to [N, B, H, size, ...]."""
    return jnp.moveaxis(split_chunks(array, size), 2, 3)


def join_heads(chunks: Float[Array, "N B H C D"], num_tokens: int) -> Float[Array, "B T H D"]:
    """The inverse of `split_heads`, without the padding."""
    num_chunks, batch, heads, size, dim = chunks.shape
    joined = chunks.transpose(1, 0, 3, 2, 4).reshape(batch, num_chunks * size, heads, dim)
    return joined[:, :num_tokens]


class Decays(NamedTuple):
    """Products of decays in each chunk; 0 between tokens of different documents.

    Attributes:
      between: from token j to token i, of which j is not the later.
      from_start: from the state before the chunk to token i.
      to_end: from token j to the state behind the chunk.
      whole: from the state before the chunk to the one behind it.
    """

    between: Float[Array, "N B H C C"]
    from_start: Float[Array, "N B H C"]
    to_end: Float[Array, "N B H C"]
    whole: Float[Array, "N B H"]


def chunk_decays(log_decay: Float[Array, "N B H C"], number: Int[Array, "N B C"]) -> Decays:
    """What is left, at each token and behind each chunk, of what came before."""
    total = jnp.cumsum(log_decay, axis=-1)
    size = log_decay.shape[-1]
    visible = number[..., :, None] == number[..., None, :]
    visible = (visible & jnp.tri(size, dtype=bool))[:, :, None]
    exponent = total[..., :, None] - total[..., None, :]
    between = jnp.exp(jnp.where(visible, exponent, -jnp.inf))
    # The state before the first chunk is that of document 0.
    before = jnp.pad(number[:-1, :, -1], ((1, 0), (0, 0)))
    goes_on = (number == before[..., None])[:, :, None]
    from_start = jnp.exp(jnp.where(goes_on, total, -jnp.inf))
    return Decays(between, from_start, between[..., -1, :], from_start[..., -1])


def pass_on(
    transition: Float[Array, "N *batch I J"],
    written: Float[Array, "N *batch K V"],
    state: Float[Array, "*batch K V"],
    times: Callable[[Array, Array], Array],
) -> tuple[Float[Array, "N *batch K V"], Float[Array, "*batch K V"]]:
    """The states of S_n+1 = times(transition_n, S_n) + written_n from chunk to chunk.

    By a tree of depth log N rather than chunk after chunk: on a GPU a loop of so small products
    waits for the start of its kernels.

    Args:
      transition: of each chunk.
      written: what each chunk leaves in the state.
      state: before the first chunk.
      times: applies a transition to a state, or to an earlier transition; associative.

    Returns:
      The state before each chunk, and the one behind the last.
    """

    def join(earlier, later):
        (first, left), (second, right) = earlier, later
        if not len(first):  # the tree's last pair is empty: no product, XLA cannot partition it
            return earlier
        return times(second, first), times(second, left) + right

    written = written.at[0].add(times(transition[0], state))
    _, behind = jax.lax.associative_scan(join, (transition, written))
    return jnp.concatenate([state[None], behind[:-1]]), behind[-1]


def wide(array: Array) -> jnp.dtype:
    """The dtype of states and sums: float32 for everything up to it, float64 for float64."""
    return jnp.promote_types(array.dtype, jnp.float32)


def product_in(dtype: jnp.dtype) -> Callable[..., Array]:
    """einsum of operands that are rounded to `dtype`, summed in float32 or wider."""
    accumulator = jnp.promote_types(dtype, jnp.float32)

    def product(equation: str, *operands: Array) -> Array:
        operands = tuple(operand.astype(dtype) for operand in operands)
        einsum = partial(jnp.einsum, precision="highest", preferred_element_type=accumulator)
        return einsum(equation, *operands)

    return product
