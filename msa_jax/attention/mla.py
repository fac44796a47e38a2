"""Multi-head latent attention: keys and values of all heads from one small latent per token."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention.mixer import MixerOutput, Mode
from msa_jax.attention.projections import default_positions, refuse_packed_cache, with_cached
from msa_jax.cache import LatentCache
from msa_jax.config import AttentionConfig
from msa_jax.nn.norm import RMSNorm
from msa_jax.nn.param import matrix
from msa_jax.nn.rope import apply_rope
from msa_jax.sharding import constrain, project
from pallas_kernels import dense_attention

_HEADS = ("batch", "sequence", "heads", None)


class MLAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A token's keys and values are up-projections of one normed latent, which is all that decoding
    keeps of them. Rotation would not commute with those, so each query head has further dims that
    rotate, and one rotated key serves them in all heads. With a latent for queries too
    (`mla.query_latent_dim`) these are projected in two steps.

    Keys and values are expanded to full heads and attended to by `dense_attention`, which wants
    both of one width: the narrower is padded with zeros. (cuDNN serves widths up to 128: that of
    queries and keys is `head_dim + mla.rope_head_dim`.)

    For a few tokens against a cache, the absorbed form is cheaper: the up-projection of the keys
    goes to the queries, that of the values to the output, and all heads attend to the latents as
    they are. Per token and head with S cached that is 2 S (2 L + R) FLOPs, for a latent of L and
    R rotated dims, instead of expanding all S latents again; it reads S (L + R) numbers.

    Args:
      config: heads, dims, `rope_theta` and the section `mla`; other fields are ignored.
      d_model: width of x.
      norm_eps: of the latents' norms.
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
        norm_eps: float = 1e-6,
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        sizes, heads = config.mla, config.num_heads
        key_dim, value_dim = config.head_dim, config.mla_value_dim

        def make(shape, axes, scale=1.0, fan_in=None):
            fan_in = shape[0] if fan_in is None else fan_in
            return matrix(rngs, shape, axes, fan_in=fan_in, dtype=param_dtype, scale=scale)

        norm = {"eps": norm_eps, "param_dtype": param_dtype}
        rank, rotated = sizes.query_latent_dim, sizes.rope_head_dim
        self.q_down = make((d_model, rank), ("embed", None)) if rank else None
        self.q_norm = RMSNorm(rank, **norm) if rank else None
        query_axis = None if rank else "embed"
        self.q = make((rank or d_model, heads, key_dim + rotated), (query_axis, "heads", None))
        self.latent = make((d_model, sizes.latent_dim), ("embed", None))
        self.latent_norm = RMSNorm(sizes.latent_dim, **norm)
        self.rope_k = make((d_model, rotated), ("embed", None))
        self.k = make((sizes.latent_dim, heads, key_dim), (None, "heads", None))
        self.v = make((sizes.latent_dim, heads, value_dim), (None, "heads", None))
        shape, fan_in = (heads, value_dim, d_model), heads * value_dim
        self.o = make(shape, ("heads", None, "embed"), output_scale, fan_in)
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: LatentCache | None = None,
        shared: Any = None,
        mode: Mode = Mode(),
    ) -> MixerOutput:
        """See `Mixer`; reports nothing."""
        refuse_packed_cache(segment_ids, cache)
        positions = default_positions(x, positions, cache)
        q, rope_q = self._queries(x, positions)
        latent, rope_k = self._latents(x, positions)
        absorbs = cache is not None and self._absorbs(x.shape[1])
        attend = self._absorbed if absorbs else self._expanded
        cache, (latent, rope_k), offset = with_cached(cache, (latent, rope_k), mode)
        o = attend(q, rope_q, latent, rope_k, segment_ids=segment_ids, query_offset=offset)
        y = project("bthv,hvm->btm", o, self.o, self.dtype, "batch", "sequence", None)
        return MixerOutput(y.astype(x.dtype), cache, shared, {})

    def _queries(self, x, positions):
        """The part of the queries without position, and the rotated part."""
        if self.q_down is not None and self.q_norm is not None:
            down = project("btm,ml->btl", x, self.q_down, self.dtype, "batch", "sequence", None)
            x = self.q_norm(down)
        q = project("btm,mhd->bthd", x, self.q, self.dtype, *_HEADS)
        q, rope_q = jnp.split(q, [self.config.head_dim], axis=-1)
        return q, self._rotate(rope_q, positions)

    def _latents(self, x, positions):
        """What a cache keeps: the normed latent and the rotated key."""
        rows = ("batch", "sequence", None)
        latent = project("btm,ml->btl", x, self.latent, self.dtype, *rows)
        rope_k = project("btm,mr->btr", x, self.rope_k, self.dtype, *rows)
        return self.latent_norm(latent), self._rotate(rope_k, positions)

    def _rotate(self, x, positions):
        config = self.config
        return apply_rope(x, positions, rope_dim=config.mla.rope_head_dim, theta=config.rope_theta)

    def _expanded(self, q, rope_q, latent, rope_k, **place):
        """Attention of full heads."""
        k = project("bsl,lhd->bshd", latent, self.k, self.dtype, *_HEADS)
        v = project("bsl,lhv->bshv", latent, self.v, self.dtype, *_HEADS)
        rope_k = rope_k[:, :, None]
        rope_k = jnp.broadcast_to(rope_k, (*k.shape[:3], rope_k.shape[-1]))
        q = jnp.concatenate([q, rope_q], axis=-1)
        k = jnp.concatenate([k, constrain(rope_k, *_HEADS)], axis=-1)
        width = max(k.shape[-1], v.shape[-1])
        o = self._attend(*(_pad(a, width) for a in (q, k, v)), **place)
        return o[..., : v.shape[-1]]

    def _absorbed(self, q, rope_q, latent, rope_k, **place):
        """The same of up-projected queries and the latents: multi-query attention."""
        q = project("bthd,lhd->bthl", q, self.k, self.dtype, *_HEADS)
        q = jnp.concatenate([q, rope_q], axis=-1)
        k = jnp.concatenate([latent, rope_k], axis=-1)[:, :, None]
        # The latents are the values too; the rotated key's dims of the output are cut off.
        o = self._attend(q, k, k, **place)[..., : latent.shape[-1]]
        return project("bthl,lhv->bthv", o, self.v, self.dtype, *_HEADS)

    def _attend(self, q, k, v, **place):
        config = self.config
        o, _ = dense_attention(
            q,
            k,
            v,
            scale=1 / math.sqrt(config.head_dim + config.mla.rope_head_dim),
            return_lse=True,
            implementation=None if config.implementation == "auto" else config.implementation,
            **place,
        )
        return o

    def _absorbs(self, num_tokens: int) -> bool:
        """Whether the absorbed form needs fewer FLOPs per cached token than expanding it."""
        expanded_dims = self.config.head_dim + self.config.mla_value_dim
        latent_dim = self.config.mla.latent_dim
        return num_tokens * (2 * latent_dim - expanded_dims) <= latent_dim * expanded_dims

    def init_cache(self, batch: int, max_length: int) -> LatentCache:
        """See `Mixer`."""
        sizes = self.config.mla
        return LatentCache.empty(
            batch, max_length, sizes.latent_dim, sizes.rope_head_dim, dtype=self.dtype
        )


def _pad(heads: Float[Array, "B T H D"], width: int) -> Float[Array, "B T H W"]:
    return jnp.pad(heads, ((0, 0), (0, 0), (0, 0), (0, width - heads.shape[-1])))
