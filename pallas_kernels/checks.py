"""Argument checks shared by the ops: one clear error each, before anything is traced."""

import jax
import numpy as np
from jaxtyping import Array, Int


def check_heads(q: Array, k: Array) -> None:
    """Raises ValueError unless q is [B, T, Hq, D], k is [B, S, Hkv, D] and Hkv divides Hq."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q and k must be [B, T, Hq, D] and [B, S, Hkv, D], not {q.shape} and {k.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"num_heads={q.shape[2]} is not a multiple of num_kv_heads={k.shape[2]}; "
            "every KV head must serve the same number of query heads"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} differ in batch or head_dim")


def check_index(index_q: Array, index_k: Array) -> None:
    """Raises ValueError unless index_q is [B, T, Hkv, Di] and index_k is [B, S, Di]."""
    if index_q.ndim != 4 or index_k.ndim != 3 or index_q.shape[3] != index_k.shape[2]:
        raise ValueError(
            f"index_q and index_k must be [B, T, Hkv, Di] and [B, S, Di], not {index_q.shape} and "
            f"{index_k.shape}"
        )


def check_blocks(block_size: int, top_k: int, num_local_blocks: int, num_sink_blocks: int) -> None:
    """Raises ValueError unless the forced blocks fit into `top_k`."""
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be >= 1")
    if num_local_blocks < 1 or num_sink_blocks < 0:
        raise ValueError(
            f"num_local_blocks={num_local_blocks} must be >= 1 (a query always sees its own block) "
            f"and num_sink_blocks={num_sink_blocks} must be >= 0"
        )
    if num_local_blocks + num_sink_blocks > top_k:
        raise ValueError(
            f"top_k={top_k} must hold the {num_local_blocks + num_sink_blocks} forced blocks "
            "(num_local_blocks + num_sink_blocks)"
        )


def check_query_fit(num_queries: int, num_keys: int, query_offset: int | Array) -> None:
    """Raises ValueError if queries would sit behind the last key slot."""
    if isinstance(query_offset, int) and query_offset + num_queries > num_keys:
        raise ValueError(
            f"{num_queries} queries at query_offset={query_offset} need "
            f"{query_offset + num_queries} key slots, there are {num_keys}"
        )


def check_segments(segment_ids: Int[Array, "B S"] | None, block_size: int) -> None:
    """Raises ValueError unless documents start on block boundaries.

    Blocks are anchored at the start of each document, so a document that starts elsewhere, as left
    padding makes it, would silently select other tokens. Arrays that are being traced have no
    values to look at and pass; the data pipeline checks them on the host.
    """
    if segment_ids is None or isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    before = np.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = np.argwhere((ids != before) & (ids > 0))
    wrong = starts[starts[:, 1] % block_size != 0]
    if len(wrong):
        row, slot = wrong[0]
        mend = "pad each document to a multiple of block_size"
        if not ids[row, :slot].any():
            mend = "this is left padding: pad on the right"
        raise ValueError(
            f"segment_ids: the document at row {row}, slot {slot} does not start on a multiple of "
            f"block_size={block_size}; {mend}"
        )
