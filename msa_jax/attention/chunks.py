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


def find_documents(segment_ids: Int[Array, "B T"] | None) -> Documents | None:
    """Documents by their segment ids, 0 for padding; None for one document per row."""
    if segment_ids is None:
        return None
    starts = (segment_ids[:, 1:] != segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    number = jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return Documents(number, segment_ids > 0)


def without_padding(array: Float[Array, "B T *rest"], documents: Documents | None) -> Array:
    """The array with 0 for padding.

    Where there is none there is no mask either: XLA would not see that it is constant, and read
    it from memory, as large as the array, in every layer.
    """
    if documents is None:
        return array
    return jnp.where(documents.real.reshape(*array.shape[:2], *(1,) * (array.ndim - 2)), array, 0)


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
    """[B, T, ...] to [B, N, size, ...], padded behind with zeros, or as `jnp.pad`'s `mode` does."""
    batch, num_tokens, *rest = array.shape
    num_chunks = -(-num_tokens // size)
    padding = [(0, 0), (0, num_chunks * size - num_tokens)] + [(0, 0)] * len(rest)
    padded = jnp.pad(array, padding, mode=mode)
    return padded.reshape(batch, num_chunks, size, *rest)


def join_chunks(chunks: Float[Array, "B N C *rest"], num_tokens: int) -> Float[Array, "B T *rest"]:
    """The inverse of `split_chunks`, without the padding."""
    return chunks.reshape(len(chunks), -1, *chunks.shape[3:])[:, :num_tokens]


def split_heads(array: Array, size: int) -> Array:
    """[B, T, H, ...] to [B, N, H, size, ...]."""
    return jnp.moveaxis(split_chunks(array, size), 2, 3)


def join_heads(chunks: Float[Array, "B N H C D"], num_tokens: int) -> Float[Array, "B T H D"]:
    """The inverse of `split_heads`, without the padding."""
    return join_chunks(jnp.swapaxes(chunks, 2, 3), num_tokens)


class Decays(NamedTuple):
    """Products of decays in each chunk; 0 between tokens of different documents.

    Attributes:
      between: from token j to token i, of which j is not the later.
      from_start: from the state before the chunk to token i.
      to_end: from token j to the state behind the chunk.
      whole: from the state before the chunk to the one behind it.
    """

    between: Float[Array, "B N H C C"]
    from_start: Float[Array, "B N H C"]
    to_end: Float[Array, "B N H C"]
    whole: Float[Array, "B N H"]


def chunk_decays(
    log_decay: Float[Array, "B N H C"], number: Int[Array, "B N C"] | None, *, long: bool = False
) -> Decays:
    """What is left, at each token and behind each chunk, of what came before.

    Args:
      log_decay: natural logs.
      number: of each token's document; None if all belong to the same.
      long: whether sums over a chunk are so large that their differences lose digits; each is then
        summed by itself.
    """
    total = jnp.cumsum(log_decay, axis=-1)
    size = log_decay.shape[-1]
    visible, from_start = jnp.tri(size, dtype=bool), total
    if number is not None:
        visible &= (number[..., :, None] == number[..., None, :])[:, :, None]
        # The state before the first chunk is that of document 0.
        before = jnp.pad(number[:, :-1, -1], ((0, 0), (1, 0)))
        goes_on = (number == before[..., None])[:, :, None]
        from_start = jnp.where(goes_on, total, -jnp.inf)
    if long:
        later = jnp.where(jnp.tri(size, k=-1, dtype=bool), log_decay[..., None], 0)
        exponent = jnp.cumsum(later, axis=-2)
    else:
        exponent = total[..., :, None] - total[..., None, :]
    between = jnp.exp(jnp.where(visible, exponent, -jnp.inf))
    from_start = jnp.exp(from_start)
    return Decays(between, from_start, between[..., -1, :], from_start[..., -1])


def wide(array: Array) -> jnp.dtype:
    """The dtype of states and sums: float32 for everything up to it, float64 for float64."""
    return jnp.promote_types(array.dtype, jnp.float32)


def product_in(dtype: jnp.dtype) -> Callable[..., Array]:
    """`product(equation, a, b, out=None)`: an einsum of two operands that are rounded to `dtype`.

    It is summed in float32 or wider, and rounded to `out` if that is given. The products of the
    backward pass are as narrow: each index of an operand must be in the other or in the result.
    """

    def product(equation: str, a: Array, b: Array, *, out: jnp.dtype | None = None) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return _product(equation, out or wide(a), a, b)

    return product


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: jnp.dtype, a: Array, b: Array) -> Array:
    # XLA would join products that share an operand, and copy the others together for that.
    a, b = jax.lax.optimization_barrier((a, b))
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=dtype)


def _product_forward(equation, dtype, a, b):
    return _product(equation, dtype, a, b), (a, b)


def _product_backward(equation, dtype, operands, cotangent):
    """With the cotangent rounded: a float32 one would widen the operands, off the tensor cores."""
    a, b = operands
    sources, result = equation.split("->")
    of_a, of_b = sources.split(",")
    cotangent = cotangent.astype(a.dtype)
    return (
        _product(f"{result},{of_b}->{of_a}", a.dtype, cotangent, b),
        _product(f"{of_a},{result}->{of_b}", b.dtype, a, cotangent),
    )


_product.defvjp(_product_forward, _product_backward)
