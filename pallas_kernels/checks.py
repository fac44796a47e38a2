"""Argument checks shared by the ops: one clear error each, before anything is traced."""

import jax
import numpy as np
from jaxtyping import Array, Int

# Keys may be pages: then what is checked is the shape of the array that they stand for.
type Shaped = Array | jax.ShapeDtypeStruct


def check_heads(q: Array, k: Shaped, v: Shaped | None = None) -> None:
    """Raises ValueError unless q is [B, T, Hq, D], k and v [B, S, Hkv, D] and Hkv divides Hq."""
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
        raise ValueError(
            f"q {q.shape} and k {k.shape} differ in batch or head_dim; they must be "
            "[B, T, Hq, D] and [B, S, Hkv, D] with the same B and D"
        )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v is {v.shape}, it must have the shape of k, {k.shape}")


def check_index(index_q: Array, index_k: Shaped) -> None:
    """Raises ValueError unless index_q is [B, T, Hkv, Di] and index_k is [B, S, Di]."""
    ranks = (index_q.ndim, index_k.ndim) == (4, 3)
    if not ranks or index_q.shape[::3] != index_k.shape[::2]:
        raise ValueError(
            f"index_q and index_k must be [B, T, Hkv, Di] and [B, S, Di], not {index_q.shape} and "
            f"{index_k.shape}"
        )


def check_index_fits(index_q: Array, index_k: Array, q: Array, k: Array) -> None:
    """Raises ValueError unless there is an index head per KV head, a query and a key per token.

    One index head for all groups would broadcast and silently give every group the same student.
    """
    expected = (*q.shape[:2], k.shape[2]), k.shape[:2]
    if (index_q.shape[:3], index_k.shape[:2]) != expected:
        raise ValueError(
            f"index_q {index_q.shape} and index_k {index_k.shape} do not fit q {q.shape} and k "
            f"{k.shape}; they must be [B, T, Hkv, Di] and [B, S, Di] with the B, T, S and Hkv of "
            "[B, T, Hq, D] and [B, S, Hkv, D]"
        )


def check_selection(block_ids: Array, q: Array, k: Shaped) -> None:
    """Raises ValueError unless block_ids is [B, Hkv, T, K] for these queries and keys."""
    expected = (q.shape[0], k.shape[2], q.shape[1])
    if block_ids.ndim != 4 or block_ids.shape[:3] != expected:
        raise ValueError(
            f"selection.block_ids is {block_ids.shape}, it must be [B, Hkv, T, K] with "
            f"(B, Hkv, T) = {expected}"
        )


def check_blocks(block_size: int, top_k: int, num_local_blocks: int, num_sink_blocks: int) -> None:
    """Raises ValueError unless the forced blocks fit into `top_k`."""
    _check_block_size(block_size)
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


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be >= 1")


def check_slots(q: Array, k: Shaped, segment_ids: Array | None, query_offset: int | Array) -> None:
    """Raises ValueError unless all queries sit in key slots and segment_ids is [B, S].

    Args:
      q: main or index queries, [B, T, ...].
      k: main or index keys, [B, S, ...].
      segment_ids: see `check_segments`.
      query_offset: slot of the first query; an array of them has no values to look at here.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    if segment_ids is not None and segment_ids.shape != k.shape[:2]:
        raise ValueError(
            f"segment_ids is {segment_ids.shape}, it must be [B, S] = {k.shape[:2]}: the document "
            "of every key slot, also of those that hold no query"
        )
    if isinstance(query_offset, int) and not 0 <= query_offset <= num_keys - num_queries:
        raise ValueError(
            f"{num_queries} queries at query_offset={query_offset} need "
            f"{query_offset + num_queries} key slots, there are {num_keys}; query_offset must be 0 "
            "to S - T, with the keys of all earlier tokens in k"
        )


def check_segments(segment_ids: Int[Array, "B S"] | None, block_size: int) -> None:
    """Raises ValueError unless documents start on block boundaries, of blocks of a token or more.

    Blocks are anchored at the start of each document, so a document that starts elsewhere, as left
    padding makes it, would silently select other tokens. Arrays that are being traced have no
    values to look at and pass; the data pipeline checks them on the host.
    """
    _check_block_size(block_size)
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
