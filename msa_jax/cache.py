"""Caches that mixers fill while decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, values and, for MSA, index keys of the tokens seen so far, contiguous per row.

    Slot j of row b is valid when j < length[b]; what lies behind is overwritten before any query
    can see it. Index keys must be kept with the rest: without them a model cannot select.

    Attributes:
      k: main keys, after norm and RoPE.
      v: values.
      index_k: index keys, after norm and RoPE; None for mixers without an index branch.
      length: cached tokens per row, the `query_offset` of the next ones.
    """

    k: Float[Array, "*layers B S Hkv D"]
    v: Float[Array, "*layers B S Hkv D"]
    index_k: Float[Array, "*layers B S Di"] | None
    length: Int[Array, "*layers B"]

    @staticmethod
    def empty(
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        index_dim: int | None,
        dtype: str,
    ) -> "KVCache":
        """A cache of `max_length` zeroed slots per row."""
        heads = (batch, max_length, num_kv_heads, head_dim)
        index_k = None if index_dim is None else jnp.zeros((batch, max_length, index_dim), dtype)
        return KVCache(
            jnp.zeros(heads, dtype), jnp.zeros(heads, dtype), index_k, jnp.zeros(batch, jnp.int32)
        )

    def append(
        self,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        index_k: Float[Array, "B T Di"] | None,
    ) -> "KVCache":
        """The cache with T more tokens in every row.

        Raises:
          ValueError: index keys without a place for them, or a place for them left empty.
        """
        if (index_k is None) != (self.index_k is None):
            raise ValueError(
                "cache: made by a mixer of another kind (one of the two has index keys, the other "
                "has not); make it with this mixer's init_cache"
            )
        return KVCache(
            _write(self.k, k, self.length),
            _write(self.v, v, self.length),
            None
            if index_k is None or self.index_k is None
            else _write(self.index_k, index_k, self.length),
            self.length + k.shape[1],
        )


def _write(slots: Array, new: Array, start: Int[Array, "B"]) -> Array:
    """Writes each row's new entries at its own start."""

    def write_row(row, new, start):
        return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis=0)

    return jax.vmap(write_row)(slots, new, start)
