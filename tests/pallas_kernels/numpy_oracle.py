"""The four ops once more, by their definitions: numpy, float64, one query at a time.

Shares no code with `pallas_kernels`, on purpose. Letters as in `docs/architecture.md`; every
function takes the ops' arguments as numpy arrays, `query_offset` as an int or one int per row.
"""

import math

import numpy as np


def offsets(query_offset, batch):
    """The slot of each row's first query."""
    return [int(offset) for offset in np.broadcast_to(query_offset, (batch,))]


def visible(slot, key, segments, window=0):
    """Whether a query in `slot` sees the key in slot `key`; `segments` is one row's, or None."""
    if key > slot or (window and key <= slot - window):
        return False
    return segments is None or (segments[slot] == segments[key] and segments[slot] > 0)


def visible_mask(batch, num_queries, num_keys, segment_ids=None, query_offset=0, window=0):
    """[B, T, S]."""
    mask = np.zeros((batch, num_queries, num_keys), bool)
    for b, offset in enumerate(offsets(query_offset, batch)):
        segments = None if segment_ids is None else segment_ids[b]
        for t in range(num_queries):
            for j in range(num_keys):
                mask[b, t, j] = visible(offset + t, j, segments, window)
    return mask


def forced_blocks(slot, segments, block_size, num_local_blocks, num_sink_blocks):
    """The blocks that the query in `slot` keeps whatever their scores."""
    first = 0
    if segments is not None:
        if segments[slot] <= 0:
            return set()
        first = int(np.argmax(segments == segments[slot])) // block_size
    document = list(range(first, slot // block_size + 1))
    return set(document[-num_local_blocks:]) | set(document[:num_sink_blocks])


def pool(scores, pooling):
    """Block score of the visible token scores of one block; -inf with a NaN among them."""
    if np.isnan(scores).any():
        return -math.inf
    if pooling == "max":
        pooled = np.max(scores)
    elif pooling == "mean":
        pooled = np.mean(scores)
    else:
        pooled = np.logaddexp.reduce(scores)
    return float(pooled)


def top_blocks(scores, forced, top_k):
    """K ids, ascending, then -1. `scores` maps a block to its score; -inf is not chosen."""
    others = [block for block in scores if block not in forced and scores[block] > -math.inf]
    others.sort(key=lambda block: (-scores[block], block))
    ids = sorted(list(forced) + others[: top_k - len(forced)])
    return ids + [-1] * (top_k - len(ids))


def select_blocks(
    index_q,
    index_k,
    *,
    block_size,
    top_k,
    num_local_blocks=1,
    num_sink_blocks=0,
    pooling="max",
    scale=None,
    segment_ids=None,
    query_offset=0,
):
    """[B, Hkv, T, K]."""
    index_q, index_k = index_q.astype(np.float64), index_k.astype(np.float64)
    batch, num_queries, num_groups, index_dim = index_q.shape
    scale = index_dim**-0.5 if scale is None else scale
    mask = visible_mask(batch, num_queries, index_k.shape[1], segment_ids, query_offset)
    block_ids = np.zeros((batch, num_groups, num_queries, top_k), np.int32)
    for b, offset in enumerate(offsets(query_offset, batch)):
        segments = None if segment_ids is None else segment_ids[b]
        for t in range(num_queries):
            forced = forced_blocks(
                offset + t, segments, block_size, num_local_blocks, num_sink_blocks
            )
            seen = np.flatnonzero(mask[b, t])
            for r in range(num_groups):
                token_scores = index_k[b] @ index_q[b, t, r] * scale
                scores = {
                    int(block): pool(token_scores[seen[seen // block_size == block]], pooling)
                    for block in np.unique(seen // block_size)
                }
                block_ids[b, r, t] = top_blocks(scores, forced, top_k)
    return block_ids


def support(
    batch,
    num_groups,
    num_queries,
    num_keys,
    block_ids=None,
    block_size=1,
    segment_ids=None,
    query_offset=0,
    window=0,
):
    """[B, Hkv, T, S]: what is visible, and in a selected block if `block_ids` are given."""
    seen = visible_mask(batch, num_queries, num_keys, segment_ids, query_offset, window)
    mask = np.repeat(seen[:, None], num_groups, axis=1)
    if block_ids is not None:
        blocks = np.arange(num_keys) // block_size
        for index in np.ndindex(batch, num_groups, num_queries):
            mask[index] &= np.isin(blocks, block_ids[index])
    return mask


def softmax(scores, mask):
    """Probabilities over the masked entries of one row, and its log-sum-exp."""
    if not mask.any():
        return np.zeros(len(scores)), -math.inf
    kept = scores[mask]
    weights = np.exp(kept - kept.max())
    probabilities = np.zeros(len(scores))
    probabilities[mask] = weights / weights.sum()
    return probabilities, kept.max() + math.log(weights.sum())


def attention(q, k, v, mask, scale=None):
    """Output [B, T, Hq, D] and log-sum-exp [B, Hq, T] over `support`'s mask."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, num_queries, num_heads, head_dim = q.shape
    per_group = num_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    o, lse = np.zeros(q.shape), np.zeros((batch, num_heads, num_queries))
    for b, t, h in np.ndindex(batch, num_queries, num_heads):
        r = h // per_group
        weights, lse[b, h, t] = softmax(k[b, :, r] @ q[b, t, h] * scale, mask[b, r, t])
        o[b, t, h] = weights @ v[b, :, r]
    return o, lse


def teacher_and_student(q, k, index_q, index_k, mask, scale=None, index_scale=None):
    """Both distributions [B, Hkv, T, S] over the support, and the student's log-sum-exp."""
    q, k, index_q, index_k = (x.astype(np.float64) for x in (q, k, index_q, index_k))
    batch, num_queries, num_heads, head_dim = q.shape
    num_groups = k.shape[2]
    per_group = num_heads // num_groups
    scale = head_dim**-0.5 if scale is None else scale
    index_scale = index_q.shape[3] ** -0.5 if index_scale is None else index_scale
    teacher, student = np.zeros(mask.shape), np.zeros(mask.shape)
    index_lse = np.zeros(mask.shape[:3])
    for b, r, t in np.ndindex(batch, num_groups, num_queries):
        for h in range(r * per_group, (r + 1) * per_group):
            scores = k[b, :, r] @ q[b, t, h] * scale
            teacher[b, r, t] += softmax(scores, mask[b, r, t])[0] / per_group
        scores = index_k[b] @ index_q[b, t, r] * index_scale
        student[b, r, t], index_lse[b, r, t] = softmax(scores, mask[b, r, t])
    return teacher, student, index_lse


def index_kl(q, k, index_q, index_k, mask, scale=None, index_scale=None):
    """KL(teacher || student) and the student's log-sum-exp, both [B, Hkv, T]."""
    teacher, student, index_lse = teacher_and_student(
        q, k, index_q, index_k, mask, scale, index_scale
    )
    kl = np.zeros(index_lse.shape)
    for index in np.ndindex(teacher.shape):
        if teacher[index] > 0:
            kl[index[:3]] += teacher[index] * math.log(teacher[index] / student[index])
    return kl, index_lse


def index_kl_gradients(q, k, index_q, index_k, mask, kl_weights, scale=None, index_scale=None):
    """Gradients of sum(kl * kl_weights) in index_q and index_k: (student - teacher) per score."""
    teacher, student, _ = teacher_and_student(q, k, index_q, index_k, mask, scale, index_scale)
    index_scale = index_q.shape[3] ** -0.5 if index_scale is None else index_scale
    dscores = (student - teacher) * kl_weights[..., None] * index_scale
    dindex_q = np.einsum("brts,bsi->btri", dscores, index_k.astype(np.float64))
    dindex_k = np.einsum("brts,btri->bsi", dscores, index_q.astype(np.float64))
    return dindex_q, dindex_k


def main_block_mass(q, k, block_size, segment_ids=None, query_offset=0):
    """Share of dense attention per block, [B, Hkv, T, N]."""
    batch, num_queries, _, _ = q.shape
    num_keys, num_groups = k.shape[1:3]
    mask = support(
        batch,
        num_groups,
        num_queries,
        num_keys,
        segment_ids=segment_ids,
        query_offset=query_offset,
    )
    unused = np.zeros((batch, num_queries, num_groups, 1)), np.zeros((batch, num_keys, 1))
    teacher, _, _ = teacher_and_student(q, k, *unused, mask)
    num_blocks = -(-num_keys // block_size)
    mass = np.zeros((*teacher.shape[:3], num_blocks))
    for key in range(num_keys):
        mass[..., key // block_size] += teacher[..., key]
    return mass


def attention_gradients(q, k, v, mask, do, dlse, scale=None):
    """Gradients of sum(o * do) + sum(lse * dlse) over visible rows, in q, k and v."""
    q, k, v, do, dlse = (x.astype(np.float64) for x in (q, k, v, do, dlse))
    batch, num_queries, num_heads, head_dim = q.shape
    per_group = num_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, t, h in np.ndindex(batch, num_queries, num_heads):
        r = h // per_group
        weights, _ = softmax(k[b, :, r] @ q[b, t, h] * scale, mask[b, r, t])
        dweights = v[b, :, r] @ do[b, t, h]
        dscores = weights * (dweights - weights @ dweights + dlse[b, h, t]) * scale
        dq[b, t, h] = dscores @ k[b, :, r]
        dk[b, :, r] += np.outer(dscores, q[b, t, h])
        dv[b, :, r] += np.outer(weights, do[b, t, h])
    return dq, dk, dv
