"""Attention without blocks: grouped-query, multi-query, multi-head and sliding-window."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from msa_jax.attention.mixer import MixerOutput, Mode
from msa_jax.attention.projections import (
    Projections,
    default_positions,
    refuse_packed_cache,
    with_cached,
)
from msa_jax.cache import KVCache
from msa_jax.config import AttentionConfig
from pallas_kernels import dense_attention


class GQAttention(nnx.Module):
    """Causal softmax attention over everything in the document, or over a sliding window.

    * `kind="gqa"` (Ainslie et al. 2023, arXiv 2305.13245): `num_heads / num_kv_heads` query heads
      share a KV head; multi-query attention (Shazeer 2019, arXiv 1911.02150) is `num_kv_heads=1`.
    * `kind="mha"` (Vaswani et al. 2017, arXiv 1706.03762): a KV head for each query head, whatever
      `num_kv_heads` says.
    * `kind="sliding_window"` (Beltagy et al. 2020, arXiv 2004.05150; Jiang et al. 2023, arXiv
      2310.06825): a query sees the last `window` tokens, itself included.

    Args:
      config: heads, dims and window; the fields of blocks and index branch are ignored.
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
        norm_eps: float = 1e-6,
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.main = Projections(
            config,
            d_model,
            norm_eps=norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
            output_scale=output_scale,
            rngs=rngs,
        )
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        shared: Any = None,
        mode: Mode = Mode(),
    ) -> MixerOutput:
        """See `Mixer`; reports nothing."""
        refuse_packed_cache(segment_ids, cache)
        q, k, v = self.main.heads(x, default_positions(x, positions, cache))
        cache, (k, v, _), offset = with_cached(cache, (k, v, None), mode)
        implementation = self.config.implementation
        o, _ = dense_attention(
            q,
            k,
            v,
            window=self.config.window,
            segment_ids=segment_ids,
            query_offset=offset,
            return_lse=True,
            implementation=None if implementation == "auto" else implementation,
        )
        y = self.main.output(o)
        return MixerOutput(y.astype(x.dtype), cache, shared, {})

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """See `Mixer`."""
        heads = (self.config.kv_heads, self.config.head_dim)
        return KVCache.empty(batch, max_length, *heads, index_dim=None, dtype=self.dtype)
