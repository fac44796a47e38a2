"""Token embedding and output head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.nn.param import matrix
from msa_jax.sharding import constrain, out_spec, project, weight

# Tables of so many rows are read by a product: no more than the output head's.
_MOST_ROWS = 4096


class Embedding(nnx.Module):
    """Token vectors, and with `tied` the output head made of the same matrix.

    Args:
      vocab_size: rows.
      d_model: width.
      tied: the head is the embedding transposed; otherwise it has its own matrix.
      dtype: of activations and of the head's matmul.
      param_dtype: of the weights.
      rngs: for the initial values.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        tied: bool,
        dtype: str = "float32",
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        like_head = {"fan_in": d_model, "dtype": param_dtype}
        self.table = matrix(rngs, (vocab_size, d_model), ("vocab", "embed"), **like_head)
        head_axes = ("embed", "vocab")
        self.head = None if tied else matrix(rngs, (d_model, vocab_size), head_axes, **like_head)
        self.dtype = dtype

    def encode(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        """The tokens' vectors.

        The gradient of a gather adds one token after the other, in 16 bits if that is the dtype,
        and on a GPU by atomics, in any order. Where a small table has many tokens per row, that is
        inexact and slow. So such a table is multiplied with 0/1 rows: the same vectors, and a
        gradient that is summed in float32.
        """
        rows = self.table.shape[0]
        if jnp.dtype(self.dtype).itemsize == 2 and rows <= _MOST_ROWS:
            chosen = jax.nn.one_hot(jnp.clip(tokens, 0, rows - 1), rows, dtype=self.dtype)
            chosen = constrain(chosen, "batch", "sequence", "vocab")
            axes = ("batch", "sequence", None)
            return project("btv,vm->btm", chosen, self.table, self.dtype, *axes)
        table = weight(self.table, self.dtype)
        return table.at[tokens].get(mode="clip", out_sharding=out_spec("batch", "sequence", None))

    def decode(self, x: Float[Array, "B T M"]) -> Float[Array, "B T V"]:
        """Logits over the vocabulary, float32."""
        axes = ("batch", "sequence", "vocab")
        if self.head is None:
            logits = project("btm,vm->btv", x, self.table, self.dtype, *axes)
        else:
            logits = project("btm,mv->btv", x, self.head, self.dtype, *axes)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
