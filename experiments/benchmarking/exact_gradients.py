"""Exact gradients of sampled query rows and of one key block, in float64 on the host.

A row's gradients follow from the inputs alone. A key block's sum over all queries that selected it,
of which the outputs and log-sum-exps are the op's own: those are held to `exact_rows` before.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from experiments.benchmarking.cases import Case
from experiments.benchmarking.exact_rows import gathered, sampled
from experiments.benchmarking.inputs import IndexInputs, MainInputs
from experiments.benchmarking.training_programs import TrainedLayer

# More queries than these would take the host too long: another block is looked at.
_MOST_QUERIES = 4096


class RowGradients(NamedTuple):
    """Of sampled rows: dq [R, Hq, D], the KL [R, Hkv] and its mean's gradient [R, Hkv, Di]."""

    q: np.ndarray
    kl: np.ndarray
    index_q: np.ndarray


class BlockGradients(NamedTuple):
    """Of one block: its id, dk and dv [Bk, Hkv, D] and the index keys' [Bk, Di]."""

    block: int
    k: np.ndarray
    v: np.ndarray
    index_k: np.ndarray


def of_rows(
    case: Case,
    arrays: MainInputs,
    index: IndexInputs,
    do: Float[Array, "B T Hq D"],
    ids: Int[np.ndarray, "R Hkv K"],
    rows: np.ndarray,
) -> RowGradients:
    """Gradients of rows of the first sequence over their selected blocks."""
    groups, length = case.num_kv_heads, case.length
    slots = ids[..., None].astype(np.int64) * case.block_size + np.arange(case.block_size)
    seen = (ids[..., None] >= 0) & (slots <= rows[:, None, None, None]) & (slots < length)
    slots, seen = (x.reshape(len(rows), groups, -1) for x in (slots, seen))
    places = np.where(seen, slots, 0).astype(np.int32)
    keys, values = (np.asarray(gathered(x, places)) for x in arrays[1:])
    index_keys = np.asarray(index.index_k[0].astype("float32"))
    queries, d_outputs, index_queries = (
        np.asarray(sampled(x, rows), np.float64) for x in (arrays.q, do, index.index_q)
    )
    scale, index_scale = case.head_dim**-0.5, case.index_dim**-0.5
    d_q, kl, d_index_q = [], [], []
    for row in range(len(rows)):
        mask = seen[row]
        k, v = (x[row].astype(np.float64) for x in (keys, values))
        index_k = index_keys[places[row]].astype(np.float64)
        q, d_o = (x[row].reshape(groups, -1, case.head_dim) for x in (queries, d_outputs))
        p = _softmax(np.einsum("hgd,hsd->hgs", q, k) * scale, mask[:, None])
        d_p = np.einsum("hgd,hsd->hgs", d_o, v)
        d_s = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * scale
        d_q.append(np.einsum("hgs,hsd->hgd", d_s, k).reshape(-1, case.head_dim))
        scores = np.einsum("hd,hsd->hs", index_queries[row], index_k) * index_scale
        teacher, student = p.mean(1), _softmax(scores, mask)
        safe = np.where(mask & (teacher > 0), teacher, 1)
        kl.append((teacher * (np.log(safe) - np.log(np.where(mask, student, 1)))).sum(-1))
        d_x = (student - teacher) * index_scale / (case.batch * groups * length)
        d_index_q.append(np.einsum("hs,hsd->hd", d_x, index_k))
    return RowGradients(*map(np.stack, (d_q, kl, d_index_q)))


def of_block(
    case: Case,
    arrays: MainInputs,
    index: IndexInputs,
    do: Float[Array, "B T Hq D"],
    layer: TrainedLayer,
    ids: Int[np.ndarray, "Hkv T K"],
) -> BlockGradients | None:
    """Gradients of a block in the middle of the first sequence; None if too many select it."""
    block = (case.length // case.block_size) // 2
    slots = np.arange(block * case.block_size, min((block + 1) * case.block_size, case.length))
    picked = [np.flatnonzero((ids[group] == block).any(-1)) for group in range(case.num_kv_heads)]
    if max(map(len, picked)) > _MOST_QUERIES:
        return None
    k, v, index_k = (
        np.asarray(sampled(x, slots), np.float64) for x in (arrays.k, arrays.v, index.index_k)
    )
    scale, index_scale = case.head_dim**-0.5, case.index_dim**-0.5
    per_group = case.num_heads // case.num_kv_heads
    d_k, d_v, d_index_k = np.zeros_like(k), np.zeros_like(v), np.zeros_like(index_k)
    for group, queries in enumerate(picked):
        heads = slice(group * per_group, (group + 1) * per_group)

        def of(x, queries=queries, heads=heads):
            return np.asarray(sampled(x, queries)[:, heads], np.float64)

        q, d_o, o = of(arrays.q), of(do), of(layer.o)
        lse = np.asarray(layer.lse[0, heads][:, queries], np.float64).T
        seen = slots <= queries[:, None]
        scores = np.einsum("tgd,sd->tgs", q, k[:, group]) * scale
        p = np.where(seen[:, None], np.exp(scores - lse[..., None]), 0)
        d_p = np.einsum("tgd,sd->tgs", d_o, v[:, group])
        d_s = p * (d_p - (d_o * o).sum(-1)[..., None]) * scale
        d_k[:, group] = np.einsum("tgs,tgd->sd", d_s, q)
        d_v[:, group] = np.einsum("tgs,tgd->sd", p, d_o)
        index_q = np.asarray(sampled(index.index_q, queries)[:, group], np.float64)
        index_lse = np.asarray(layer.index_lse[0, group][queries], np.float64)
        student = np.exp(index_q @ index_k.T * index_scale - index_lse[:, None])
        d_x = np.where(seen, student - p.mean(1), 0) * index_scale
        d_index_k += d_x.T @ index_q / (case.batch * case.num_kv_heads * case.length)
    return BlockGradients(block, d_k, d_v, d_index_k)


def _softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
