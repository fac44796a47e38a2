"""Query, key, value and output projections, shared by the softmax-attention mixers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention.mixer import Mode
from msa_jax.cache import Cache, KVCache, LatentCache
from msa_jax.config import AttentionConfig
from msa_jax.nn.norm import RMSNorm
from msa_jax.nn.param import matrix
from msa_jax.nn.rope import apply_rope
from msa_jax.sharding import project


class Projections(nnx.Module):
    """x to q, k, v with per-head norms and partial RoPE, and heads back to x.

    Args:
      config: heads and dims.
      d_model: width of x.
      norm_eps: of the per-head norms.
      dtype: of the matmuls.
      param_dtype: of the weights.
      output_scale: factor on the output matrix's initial deviation.
      rngs: for the initial values.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        norm_eps: float,
        dtype: str,
        param_dtype: str,
        output_scale: float,
        rngs: nnx.Rngs,
    ):
        inward = {"fan_in": d_model, "dtype": param_dtype}
        query_shape = (d_model, config.num_heads, config.head_dim)
        key_shape = (d_model, config.kv_heads, config.head_dim)
        axes = ("embed", "heads", None)
        self.q = matrix(rngs, query_shape, axes, **inward)
        self.k = matrix(rngs, key_shape, axes, **inward)
        self.v = matrix(rngs, key_shape, axes, **inward)
        self.o = matrix(
            rngs,
            (config.num_heads, config.head_dim, d_model),
            ("heads", None, "embed"),
            fan_in=config.num_heads * config.head_dim,
            dtype=param_dtype,
            scale=output_scale,
        )
        norm = {"eps": norm_eps, "param_dtype": param_dtype}
        self.q_norm = RMSNorm(config.head_dim, **norm) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, **norm) if config.qk_norm else None
        self.config = config
        self.dtype = dtype

    def heads(
        self, x: Float[Array, "B T M"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hkv D"], Float[Array, "B T Hkv D"]]:
        """q, k and v, the first two normed and rotated."""
        axes = ("batch", "sequence", "heads", None)
        q, k, v = (
            project("btm,mhd->bthd", x, w, self.dtype, *axes) for w in (self.q, self.k, self.v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = {"rope_dim": self.config.rope_dim, "theta": self.config.rope_theta}
        return apply_rope(q, positions, **rope), apply_rope(k, positions, **rope), v

    def output(self, o: Float[Array, "B T Hq D"]) -> Float[Array, "B T M"]:
        """The heads' outputs, mixed back to the model's width."""
        return project("bthd,hdm->btm", o, self.o, self.dtype, "batch", "sequence", None)


def default_positions(
    x: Float[Array, "B T M"], positions: Int[Array, "B T"] | None, cache: Cache | None
) -> Int[Array, "B T"]:
    """The given positions, or a count that goes on from the cached tokens."""
    if positions is not None:
        return positions
    count = jnp.arange(x.shape[1], dtype=jnp.int32)
    start = jnp.zeros(x.shape[0], jnp.int32) if cache is None else cache.length
    return start[:, None] + count


def with_cached[C: (KVCache, LatentCache)](
    cache: C | None, new: tuple[Any, ...], mode: Mode
) -> tuple[C | None, tuple[Any, ...], Int[Array, "B"] | int]:
    """The cache with new tokens in it, what these attend to, and the slot of the first of them."""
    if cache is None:
        return None, new, 0
    longer = cache.append(*new)
    return (longer, new, 0) if mode.prefill else (longer, longer.entries, cache.length)


def refuse_packed_cache(segment_ids: Array | None, cache: Cache | None) -> None:
    """Raises ValueError where both are given: a cache holds one document per row."""
    if segment_ids is not None and cache is not None:
        raise ValueError(
            "segment_ids together with a cache: a cache holds one document per row; pad prompts on "
            "the right and pass prompt_lengths to generate"
        )
