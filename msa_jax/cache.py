"""Caches that mixers fill while decoding.

All have `length`, the tokens seen so far per row. Prompts of different lengths come padded on the
right: `before_prompts` tells the caches where padding begins, `after_prompts` readies them for the
tokens behind each prompt. Keys of padding may lie in a cache, since later tokens overwrite them
before any query sees them; a recurrent state could never be rid of them.
"""

import dataclasses
from typing import Any

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

    @property
    def entries(self) -> tuple[Array, Array, Array | None]:
        """What `append` takes, of all slots."""
        return self.k, self.v, self.index_k

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What multi-head latent attention keeps of the tokens seen so far, contiguous per row.

    Attributes:
      latent: the normed latent that keys and values are made from.
      rope_k: the rotated key that all heads share.
      length: cached tokens per row, the `query_offset` of the next ones.
    """

    latent: Float[Array, "*layers B S L"]
    rope_k: Float[Array, "*layers B S R"]
    length: Int[Array, "*layers B"]

    @property
    def entries(self) -> tuple[Array, Array]:
        """What `append` takes, of all slots."""
        return self.latent, self.rope_k

    @staticmethod
    def empty(
        batch: int, max_length: int, latent_dim: int, rope_head_dim: int, *, dtype: str
    ) -> "LatentCache":
        """A cache of `max_length` zeroed slots per row."""
        return LatentCache(
            jnp.zeros((batch, max_length, latent_dim), dtype),
            jnp.zeros((batch, max_length, rope_head_dim), dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def append(self, latent: Float[Array, "B T L"], rope_k: Float[Array, "B T R"]) -> "LatentCache":
        """The cache with T more tokens in every row."""
        return LatentCache(
            _write(self.latent, latent, self.length),
            _write(self.rope_k, rope_k, self.length),
            self.length + latent.shape[1],
        )


NO_LIMIT = 2**31 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """What a recurrent mixer keeps: its size does not grow with the tokens seen.

    Attributes:
      tails: per short convolution, its inputs of the last tokens.
      state: per head, float32 (float64 for float64 layers).
      length: tokens seen per row.
      limit: tokens from this place of their row on are padding, which leaves the cache as it was.
    """

    tails: tuple[Float[Array, "..."], ...]
    state: Float[Array, "*layers B H _ _"]
    length: Int[Array, "*layers B"]
    limit: Int[Array, "*layers B"]

    @staticmethod
    def empty(
        batch: int,
        *,
        tails: tuple[tuple[int, ...], ...],
        state: tuple[int, int, int],
        dtype: str,
    ) -> "RecurrentCache":
        """A cache that has seen nothing: zero states.

        Args:
          batch: rows.
          tails: shape of each convolution's tail of one row.
          state: shape of one row's state.
          dtype: of the tails.
        """
        return RecurrentCache(
            tuple(jnp.zeros((batch, *shape), dtype) for shape in tails),
            jnp.zeros((batch, *state), jnp.promote_types(dtype, jnp.float32)),
            jnp.zeros(batch, jnp.int32),
            jnp.full(batch, NO_LIMIT, jnp.int32),
        )

    def segment_ids(self, num_tokens: int) -> Int[Array, "B T"]:
        """1 for each of the next tokens that is real, 0 for padding."""
        place = self.length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
        return (place < self.limit[:, None]).astype(jnp.int32)

    def advance(self, num_tokens: int, tails: tuple[Array, ...], state: Array) -> "RecurrentCache":
        """The cache after so many more tokens, padding among them."""
        tails = tuple(new.astype(old.dtype) for old, new in zip(self.tails, tails, strict=True))
        seen = jnp.clip(self.limit, self.length, self.length + num_tokens)
        return RecurrentCache(tails, state.astype(self.state.dtype), seen, self.limit)


type Cache = KVCache | LatentCache | RecurrentCache


def before_prompts(caches: Any, prompt_lengths: Int[Array, "B"]) -> Any:
    """A pytree of empty caches, ready for prompts of these lengths that are padded on the right."""

    def ready(cache: Cache) -> Cache:
        if isinstance(cache, RecurrentCache):
            return dataclasses.replace(cache, limit=_like(cache.limit, prompt_lengths))
        return cache

    return jax.tree.map(ready, caches, is_leaf=_is_cache)


def after_prompts(caches: Any, prompt_lengths: Int[Array, "B"]) -> Any:
    """A pytree of caches that saw such prompts, ready for the token behind each prompt."""

    def ready(cache: Cache) -> Cache:
        if isinstance(cache, RecurrentCache):
            return dataclasses.replace(cache, limit=jnp.full_like(cache.limit, NO_LIMIT))
        return dataclasses.replace(cache, length=_like(cache.length, prompt_lengths))

    return jax.tree.map(ready, caches, is_leaf=_is_cache)


def _is_cache(node: Any) -> bool:
    return isinstance(node, KVCache | LatentCache | RecurrentCache)


def _like(per_layer: Int[Array, "*layers B"], per_row: Int[Array, "B"]) -> Int[Array, "*layers B"]:
    return jnp.broadcast_to(per_row, per_layer.shape).astype(per_layer.dtype)


def _write(slots: Array, new: Array, start: Int[Array, "B"]) -> Array:
    """Writes each row's new entries at its own start."""

    def write_row(row, new, start):
        return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis=0)

    return jax.vmap(write_row)(slots, new, start)
