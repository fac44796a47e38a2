"""The KL alignment loss by its definition, row by row, in query chunks.

Teacher: softmax of the main scores over the support per head, then the mean over the group's heads.
Student: softmax of the index scores over the same support. Only the student has a gradient, which
is student - teacher per score.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_attention.reference import (
    head_scores,
    masked_log_sum_exp,
    score_bytes,
)
from pallas_kernels.select_blocks.reference import index_scores
from pallas_kernels.sparse_attention.reference import support
from pallas_kernels.visibility import map_query_chunks, visible_slots


def index_kl(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    index_q: Float[Array, "B T Hkv Di"],
    index_k: Float[Array, "B S Di"],
    block_ids: Int[Array, "B Hkv T K"] | None,
    segment_ids: Int[Array, "B S"] | None,
    query_offset: Int[Array, "B"] | int,
    main_lse: Float[Array, "B Hq T"] | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
) -> tuple[Float[Array, "B Hkv T"], Float[Array, "B Hkv T"]]:
    """KL(teacher || student) and the student's log-sum-exp per query and group, in nats.

    `main_lse` is not read: the teacher's own softmax is the definition.
    """
    q, k = jax.lax.stop_gradient((q, k))

    def align(q, index_q, block_ids, slots, k, index_k, segment_ids):
        if block_ids is None:
            mask = visible_slots(slots, k.shape[1], segment_ids)[:, None]
        else:
            block_ids = block_ids.swapaxes(1, 2)
            mask = support(block_ids, block_size, slots, k.shape[1], segment_ids)
        per_head, _ = masked_log_sum_exp(head_scores(q, k, scale), mask[:, :, None])
        teacher = per_head.mean(2)
        scores = index_scores(index_q, index_k, index_scale)
        _, index_lse = masked_log_sum_exp(scores, mask)
        # KL = sum t log t - sum t log softmax(s), and the log-softmax is s - lse: t sums to 1.
        negative_entropy = jax.scipy.special.xlogy(teacher, teacher).sum(-1)
        cross = jnp.where(mask, teacher * scores, 0).sum(-1)
        kl = negative_entropy - cross + jnp.where(mask.any(-1), index_lse, 0)
        return kl.swapaxes(1, 2), index_lse.swapaxes(1, 2)

    kl, index_lse = map_query_chunks(
        align,
        (q, index_q, None if block_ids is None else block_ids.swapaxes(1, 2)),
        (k, index_k, segment_ids),
        query_offset,
        bytes_per_query=score_bytes(q, k),
    )
    return kl.swapaxes(1, 2), index_lse.swapaxes(1, 2)
