"""Packing: documents of any length into rows of one length, each starting on a block boundary.

A document longer than a row is cut into pieces of one row each and a shorter last one; every piece
is packed, and to the model is, a document of its own: its own segment id, positions from 0. Best
fit over a pool of open rows keeps padding to the part of a last block that a piece leaves empty,
and little else. No token is dropped. `join_documents` is the other way to fill rows: without
padding, each row one document.

A batch is a dict of int32 arrays [B, T]: `tokens`; `targets`, the next token of the document (also
across a cut, so that no token goes unpredicted); `segment_ids`, 0 in padding, else counting from 1
in every row; `positions` inside the piece; `loss_mask`, 1 where there is a target. Padding is 0 in
all of them.
"""

import sys
from collections.abc import Mapping, Sequence

import grain
import numpy as np
from grain import experimental as grain_experimental

Batch = dict[str, np.ndarray]
BATCH_KEYS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")

# The pool of rows that documents are fitted into. It is also shuffled and so decides how many
# documents the rows of one batch come from, and it is what restoring a state packs again.
POOL_TOKENS = 2**20
POOL_ROWS = (8, 2048)


def pack_documents(
    documents: grain.IterDataset,
    *,
    sequence_length: int,
    block_size: int,
    separator_id: int | None,
    seed: int,
) -> grain.IterDataset:
    """Packs a stream of documents into a stream of rows, in shuffled order.

    Args:
      documents: of arrays [n] of token ids; empty ones vanish.
      sequence_length: T, a multiple of `block_size`.
      block_size: pieces start on multiples of it.
      separator_id: see `split_document`.
      seed: of the order of the rows.

    Returns:
      Rows, batches without their leading axis.

    Raises:
      ValueError: `sequence_length` is not a multiple of `block_size`.
    """
    if sequence_length % block_size:
        raise ValueError(
            f"sequence_length={sequence_length}: must be a multiple of block_size={block_size}"
        )
    pieces = grain_experimental.FlatMapIterDataset(
        documents, _SplitDocuments(sequence_length, separator_id)
    )
    rows = grain_experimental.BestFitPackIterDataset(
        pieces,
        length_struct={"piece": sequence_length},
        pack_alignment_struct={"piece": block_size},
        num_packing_bins=_pool_rows(sequence_length),
        shuffle_bins=True,
        seed=seed,
    )
    return rows.map(_name_columns)


def join_documents(
    documents: grain.IterDataset,
    *,
    sequence_length: int,
    separator_id: int | None,
    seed: int,
) -> grain.IterDataset:
    """Joins a stream of documents end to end and cuts it into full rows, in shuffled order.

    Each row is one document to the model: segment id 1, positions from 0, attention across the
    borders of what was joined. No token is dropped; only the last row of a finite stream may be
    padded, on the right.

    Args:
      documents: of arrays [n] of token ids; empty ones vanish.
      sequence_length: T.
      separator_id: see `split_document`.
      seed: of the order of the rows.

    Returns:
      Rows, batches without their leading axis.
    """
    whole = grain_experimental.FlatMapIterDataset(
        documents, _SplitDocuments(sys.maxsize, separator_id)
    )
    rows = grain_experimental.ConcatThenSplitIterDataset(
        whole, length_struct={"piece": sequence_length}
    )
    shuffled = grain_experimental.WindowShuffleIterDataset(
        rows, window_size=_pool_rows(sequence_length), seed=seed
    )
    return shuffled.map(_as_one_document)


def _pool_rows(sequence_length: int) -> int:
    fewest, most = POOL_ROWS
    return min(max(POOL_TOKENS // sequence_length, fewest), most)


def split_document(
    tokens: np.ndarray, *, sequence_length: int, separator_id: int | None
) -> list[np.ndarray]:
    """Cuts one document into pieces that fit a row.

    With a separator the inputs are [separator, t1, ..., tn] and the targets [t1, ..., tn,
    separator]. Without one they are [t1, ..., tn] and [t2, ..., tn], and tn has no target.

    Args:
      tokens: [n] token ids.
      sequence_length: most tokens in a piece.
      separator_id: id between documents, or None.

    Returns:
      int32 arrays [m, 3], m <= sequence_length, of columns token, target, loss mask. None for a
      document without tokens.
    """
    if len(tokens) == 0:
        return []
    if separator_id is None:
        inputs, targets = tokens, np.append(tokens[1:], 0)
    else:
        inputs, targets = np.insert(tokens, 0, separator_id), np.append(tokens, separator_id)
    columns = np.stack([inputs, targets, np.ones_like(inputs)], axis=1).astype(np.int32)
    columns[-1, 2] = separator_id is not None
    return [columns[i : i + sequence_length] for i in range(0, len(columns), sequence_length)]


class _SplitDocuments(grain_experimental.FlatMapTransform):
    max_fan_out = sys.maxsize

    def __init__(self, sequence_length: int, separator_id: int | None):
        self._sequence_length = sequence_length
        self._separator_id = separator_id

    def flat_map(self, element: np.ndarray) -> Sequence[dict[str, np.ndarray]]:
        pieces = split_document(
            element, sequence_length=self._sequence_length, separator_id=self._separator_id
        )
        return [{"piece": piece} for piece in pieces]


def _name_columns(packed: Mapping[str, np.ndarray]) -> Batch:
    columns = packed["piece"]
    return {
        "tokens": columns[:, 0],
        "targets": columns[:, 1],
        "segment_ids": packed["piece_segment_ids"],
        "positions": packed["piece_positions"],
        "loss_mask": columns[:, 2],
    }


def _as_one_document(packed: Mapping[str, np.ndarray]) -> Batch:
    real = (packed["piece_segment_ids"] > 0).astype(np.int32)
    positions = np.arange(len(real), dtype=np.int32) * real
    return _name_columns(
        {"piece": packed["piece"], "piece_segment_ids": real, "piece_positions": positions}
    )


def cut_rows(batch: Batch, length: int) -> Batch:
    """Cuts rows of T tokens into rows of `length`; every piece of a document becomes a document.

    Args:
      batch: arrays [B, T].
      length: of the new rows; divides T, and is a multiple of the block size if `batch` is packed
        for one.

    Returns:
      Arrays [B T / length, length]: the same tokens and targets, positions from 0 where a document
      goes on from the row before.
    """
    cut = {key: array.reshape(-1, length) for key, array in batch.items()}
    segment_ids, positions = cut["segment_ids"], cut["positions"]
    goes_on = segment_ids == segment_ids[:, :1]
    return cut | {"positions": positions - np.where(goes_on, positions[:, :1], 0)}


def padding_share(batch: Mapping[str, np.ndarray]) -> float:
    """The share of a batch's slots that hold padding."""
    return float(np.mean(np.asarray(batch["segment_ids"]) == 0))


def validate_batch(batch: Mapping[str, np.ndarray], block_size: int) -> None:
    """Checks what the model relies on and cannot see under jit.

    Args:
      batch: with integer arrays [B, T] under at least `BATCH_KEYS`.
      block_size: Bk of the attention that will read it.

    Raises:
      ValueError: an array is missing, shapes differ, a document does not start on a block boundary
        or comes in two parts, there is padding on the left, or padding counts in the loss.
    """
    missing = [key for key in BATCH_KEYS if key not in batch]
    if missing:
        raise ValueError(f"batch has no {', '.join(missing)}; it needs {', '.join(BATCH_KEYS)}")
    arrays = {key: np.asarray(batch[key]) for key in BATCH_KEYS}
    shapes = {key: array.shape for key, array in arrays.items()}
    if len(set(shapes.values())) != 1 or arrays["tokens"].ndim != 2:
        raise ValueError(f"batch: all arrays must have one shape [B, T], but they have {shapes}")
    for key, array in arrays.items():
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"batch[{key!r}]: must hold integers, not {array.dtype}")
    _validate_segments(arrays["segment_ids"], block_size)
    mask = arrays["loss_mask"]
    wrong = (mask != 0) & ((mask != 1) | (arrays["segment_ids"] == 0))
    if wrong.any():
        raise ValueError(
            f"batch['loss_mask']: must be 0 or 1, and 0 in padding, but not so at {_first(wrong)}"
        )


def _validate_segments(segment_ids: np.ndarray, block_size: int) -> None:
    rows, slots = segment_ids.shape
    if slots % block_size:
        raise ValueError(
            f"batch: rows of {slots} slots do not divide into blocks of {block_size}; "
            "pad on the right to a multiple"
        )
    if (segment_ids < 0).any():
        raise ValueError(
            f"batch['segment_ids']: must be >= 0, but not so at {_first(segment_ids < 0)}"
        )
    left = (segment_ids[:, :1] == 0) & (segment_ids > 0).any(axis=1, keepdims=True)
    if left.any():
        raise ValueError(
            f"batch['segment_ids']: padding before the first document at {_first(left)}; blocks "
            "count from slot 0: pad on the right"
        )
    before = np.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = (segment_ids > 0) & (segment_ids != before)
    off_block = starts & (np.arange(slots) % block_size != 0)
    if off_block.any():
        raise ValueError(
            f"batch['segment_ids']: a document starts at {_first(off_block)}, which is not a "
            f"multiple of block_size={block_size}; pad behind the document before it"
        )
    for row in range(rows):
        ids, counts = np.unique(segment_ids[row, starts[row]], return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"batch['segment_ids']: id {ids[counts > 1][0]} of row {row} names more than one "
                "run of slots; give each document an id of its own"
            )


def _first(wrong: np.ndarray) -> str:
    row, slot = np.argwhere(wrong)[0]
    return f"row {row}, slot {slot}"
