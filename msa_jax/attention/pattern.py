"""Attention to blocks that a fixed pattern names: Longformer, BigBird, and MSA without learning.

A pattern depends on a query's place in its document alone (the "oracle" selector apart), so there
is nothing to train but the usual projections, and the kernels are those of MSA's main branch.
"""

from typing import Any

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from msa_jax.attention.diagnostics import selection_reports
from msa_jax.attention.mixer import BLOCK_IDS, MixerOutput, Mode
from msa_jax.attention.projections import (
    Projections,
    default_positions,
    refuse_packed_cache,
    with_cached,
)
from msa_jax.cache import KVCache
from msa_jax.config import AttentionConfig
from pallas_kernels import BlockSelection, select_pattern, sparse_attention


def fixed_selection(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    config: AttentionConfig,
    *,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: int | Int[Array, "B"],
) -> BlockSelection:
    """The blocks that a `kind` with a fixed pattern, or a selector that learns nothing, keeps.

    Args:
      q: main queries; only the "oracle" selector reads more than their shape.
      k: main keys.
      config: `kind` "longformer" or "bigbird", or "msa" with a `selector` other than "learned".
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query.
    """
    pattern, num_local_blocks = config.selector, config.num_local_blocks
    if config.kind == "longformer":
        pattern = "sink_window"
    elif config.kind == "bigbird":
        # With sinks and window forced, what is left of top_k is drawn.
        pattern = "random_per_block"
        num_local_blocks = config.top_k - config.num_sink_blocks - config.num_random_blocks
    selection = select_pattern(
        pattern,
        q,
        k,
        block_size=config.block_size,
        top_k=config.top_k,
        num_local_blocks=num_local_blocks,
        num_sink_blocks=config.num_sink_blocks,
        segment_ids=segment_ids,
        query_offset=query_offset,
    )
    ids = checkpoint_name(selection.block_ids, BLOCK_IDS)
    return BlockSelection(ids, selection.block_size)


class PatternAttention(nnx.Module):
    """Causal softmax attention to `top_k` blocks, the query's own among them.

    * `kind="longformer"` (Beltagy et al. 2020, arXiv 2004.05150): global tokens and a window. The
      first `num_sink_blocks` blocks of the document, and the last `top_k - num_sink_blocks`.
    * `kind="bigbird"` (Zaheer et al. 2020, arXiv 2007.14062): random blocks besides. The first
      `num_sink_blocks`, `num_random_blocks` of the others, and the last blocks for the rest of
      `top_k`. Queries of a block share their random blocks, KV groups draw their own, and all
      layers and calls draw alike.

    The published models are encoders, whose global tokens also attend to everything. Under a causal
    mask those at the document's start see only their past: what remains of a global token is that
    every later one sees it, which is what its block does here. The window is counted in blocks, not
    in tokens, and Longformer's second set of projections for global tokens is left out.

    Args:
      config: heads, dims, block size and pattern; index-branch fields are ignored.
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
        """See `Mixer`; with `mode.diagnostics` `aux` holds what `selection_metrics` returns."""
        refuse_packed_cache(segment_ids, cache)
        q, k, v = self.main.heads(x, default_positions(x, positions, cache))
        cache, (k, v, _), offset = with_cached(cache, (k, v, None), mode)
        place = {"segment_ids": segment_ids, "query_offset": offset}
        selection = fixed_selection(q, k, self.config, **place)
        name = self.config.implementation
        implementation = None if name == "auto" else name
        o, _ = sparse_attention(q, k, v, selection, implementation=implementation, **place)
        aux = selection_reports(q, k, selection, self.config, mode, **place)
        return MixerOutput(self.main.output(o).astype(x.dtype), cache, shared, aux)

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """See `Mixer`."""
        heads = (self.config.kv_heads, self.config.head_dim)
        return KVCache.empty(batch, max_length, *heads, index_dim=None, dtype=self.dtype)
