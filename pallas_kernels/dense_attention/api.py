"""`dense_attention`: causal grouped-query attention, the baseline and the warm-up's main branch."""

import math

from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_heads, check_slots
from pallas_kernels.dense_attention import cudnn, reference
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.sharding import shard_over_batch_heads_and_queries

IMPLEMENTATIONS = {
    "cudnn": cudnn.dense_attention,
    "reference": reference.dense_attention,
}


def dense_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    *,
    window: int = 0,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    query_offset: int | Int[Array, "B"] = 0,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B T Hq D"] | tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Causal softmax attention over everything a query sees. Differentiable in q, k and v.

    Args:
      q: queries; head h belongs to KV head h // (Hq / Hkv). Hkv = Hq is multi-head attention,
        Hkv = 1 multi-query.
      k: keys.
      v: values.
      window: a query sees the last `window` slots, its own included; 0 sees all.
      scale: of the scores, 1 / sqrt(D) by default.
      segment_ids: document of each key slot, 0 for padding; None for one document per row.
      query_offset: the key slot of the first query, per row or for all.
      return_lse: also return the natural log-sum-exp of the scaled scores in float32.
      implementation: "cudnn" (CUDA) or "reference" (XLA, query chunks); see
        `pallas_kernels.dispatch`.

    Returns:
      The output in q's dtype, or (output, log-sum-exp). A row with nothing visible (padding) has
      output 0 and log-sum-exp -inf.

    Raises:
      ValueError: shapes that differ, or a negative window.
    """
    check_heads(q, k, v)
    check_slots(q, k, segment_ids, query_offset)
    if window < 0:
        raise ValueError(f"window={window} must be >= 1, or 0 for no window")
    run = dispatch("dense_attention", IMPLEMENTATIONS, implementation)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def local(*arrays):
        return run(*arrays, window=window, scale=scale, return_lse=return_lse)

    layouts = ("bqh.", "b.h.", "b.h.", "b.", "o")
    outputs = ("bqh.", "bhq") if return_lse else ("bqh.",)
    results = shard_over_batch_heads_and_queries(local, layouts, outputs)(
        q, k, v, segment_ids, query_offset
    )
    if return_lse:
        o, lse = results
        return o, lse
    (o,) = results
    return o
