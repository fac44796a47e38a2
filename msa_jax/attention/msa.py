"""MiniMax Sparse Attention: a light index branch picks blocks, the main branch attends to them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from msa_jax.attention.diagnostics import selection_reports
from msa_jax.attention.mixer import BLOCK_IDS, MixerOutput, Mode
from msa_jax.attention.pattern import fixed_selection
from msa_jax.attention.projections import (
    Projections,
    default_positions,
    refuse_packed_cache,
    with_cached,
)
from msa_jax.cache import KVCache
from msa_jax.config import AttentionConfig
from msa_jax.nn.norm import RMSNorm
from msa_jax.nn.param import matrix
from msa_jax.nn.rope import apply_rope
from msa_jax.sharding import project
from pallas_kernels import (
    BlockSelection,
    dense_attention,
    index_kl,
    select_blocks,
    sparse_attention,
)


class IndexBranch(nnx.Module):
    """x to one light query head per KV group and one key head for all (msa.md: two matrices).

    Args:
      config: groups and index dims.
      d_model: width of x.
      norm_eps: of the per-head norms.
      dtype: of the matmuls.
      param_dtype: of the weights.
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
        rngs: nnx.Rngs,
    ):
        inward = {"fan_in": d_model, "dtype": param_dtype}
        query_shape = (d_model, config.kv_heads, config.index_dim)
        self.q = matrix(rngs, query_shape, ("embed", "heads", None), **inward)
        self.k = matrix(rngs, (d_model, config.index_dim), ("embed", None), **inward)
        norm = {"eps": norm_eps, "param_dtype": param_dtype}
        self.q_norm = RMSNorm(config.index_dim, **norm) if config.index_norm else None
        self.k_norm = RMSNorm(config.index_dim, **norm) if config.index_norm else None
        self.config = config
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "B T M"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T Hkv Di"], Float[Array, "B T Di"]]:
        """Index queries and keys, normed and rotated; x gets no gradient from them."""
        if self.config.detach_index_input:
            x = jax.lax.stop_gradient(x)
        index_q = project(
            "btm,mhi->bthi", x, self.q, self.dtype, "batch", "sequence", "heads", None
        )
        index_k = project("btm,mi->bti", x, self.k, self.dtype, "batch", "sequence", None)
        if self.q_norm is not None and self.k_norm is not None:
            index_q, index_k = self.q_norm(index_q), self.k_norm(index_k)
        rope = {"rope_dim": self.config.index_rope_dim, "theta": self.config.rope_theta}
        return apply_rope(index_q, positions, **rope), apply_rope(index_k, positions, **rope)


class MSAttention(nnx.Module):
    """MiniMax Sparse Attention (arXiv 2606.13392), a drop-in for grouped-query attention.

    A call runs: project to q, k, v and, from the detached input, to index queries and keys; select
    `top_k` blocks per query and KV group; attend exactly to their tokens; project back. With
    `mode.losses` it also returns the KL divergence that is the index branch's only teacher: add it
    to the loss, or the selection never learns.

    Example:
      attention = MSAttention(AttentionConfig(num_heads=8, num_kv_heads=2), 512, rngs=nnx.Rngs(0))
      y = attention(x).y

    Args:
      config: heads, dims and block selection.
      d_model: width of x.
      computes_selection: False builds a layer without index branch that reuses the selection of
        the layer below (`config.share_every`).
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
        computes_selection: bool = True,
        norm_eps: float = 1e-6,
        dtype: str = "float32",
        param_dtype: str = "float32",
        output_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        common = {"norm_eps": norm_eps, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.main = Projections(config, d_model, output_scale=output_scale, **common)
        learns = computes_selection and config.selector == "learned"
        self.index = IndexBranch(config, d_model, **common) if learns else None
        self.computes_selection = computes_selection
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        shared: BlockSelection | None = None,
        mode: Mode = Mode(),
    ) -> MixerOutput:
        """See `Mixer`.

        `aux`: with `mode.losses` and a learned selection `index_kl`, the mean over real queries and
        groups in nats; with `mode.diagnostics` what `selection_metrics` returns.
        """
        refuse_packed_cache(segment_ids, cache)
        positions = default_positions(x, positions, cache)
        q, k, v = self.main.heads(x, positions)
        index_q, index_k = (None, None) if self.index is None else self.index(x, positions)
        cache, (k, v, index_k), offset = with_cached(cache, (k, v, index_k), mode)
        place = {"segment_ids": segment_ids, "query_offset": offset}
        implementation = (
            None if self.config.implementation == "auto" else self.config.implementation
        )

        selection = None
        if mode.phase == "sparse" or mode.diagnostics or mode.selections:
            selection = self._select(q, k, index_q, index_k, shared, implementation, **place)
        attention = {"implementation": implementation, **place}
        if mode.phase == "warmup" or selection is None:
            o, lse = dense_attention(q, k, v, return_lse=True, **attention)
        else:
            o, lse = sparse_attention(q, k, v, selection, **attention)
        y = self.main.output(o)

        aux = {}
        if mode.losses and index_q is not None and index_k is not None:
            support = None if mode.phase == "warmup" else selection
            aux["index_kl"] = index_kl(
                q,
                k,
                index_q,
                index_k,
                support,
                main_lse=jax.lax.stop_gradient(lse),
                weights=_weights_of_the_mean(segment_ids, index_q.shape[2]),
                implementation=implementation,
                **place,
            ).loss
        if selection is not None and self.computes_selection:
            aux |= selection_reports(q, k, selection, self.config, mode, **place)
        return MixerOutput(y.astype(x.dtype), cache, selection, aux)

    def _select(self, q, k, index_q, index_k, shared, implementation, **place) -> BlockSelection:
        """This layer's own selection, or the one it is lent."""
        config = self.config
        if not self.computes_selection:
            if shared is None:
                raise ValueError(
                    "shared=None: a layer with computes_selection=False reuses the selection of "
                    "the layer below; pass its MixerOutput.shared"
                )
            return shared
        if config.selector != "learned":
            return fixed_selection(q, k, config, **place)
        selection = select_blocks(
            index_q,
            index_k,
            block_size=config.block_size,
            top_k=config.top_k,
            num_local_blocks=config.num_local_blocks,
            num_sink_blocks=config.num_sink_blocks,
            pooling=config.pooling,
            index_precision=config.index_precision,
            implementation=implementation,
            **place,
        )
        ids = checkpoint_name(selection.block_ids, BLOCK_IDS)
        return BlockSelection(ids, selection.block_size)

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """See `Mixer`; holds index keys too where this layer has an index branch."""
        heads = (self.config.kv_heads, self.config.head_dim)
        index_dim = None if self.index is None else self.config.index_dim
        return KVCache.empty(batch, max_length, *heads, index_dim=index_dim, dtype=self.dtype)


def _weights_of_the_mean(
    segment_ids: Int[Array, "B T"] | None, groups: int
) -> Float[Array, "B Hkv T"] | None:
    """Weights of the mean over groups and over queries that are not padding."""
    if segment_ids is None:
        return None
    real = segment_ids > 0
    share = real / (jnp.maximum(real.sum(), 1) * groups)
    return jnp.repeat(share[:, None], groups, axis=1)
