"""Packing: no token lost, documents apart and on block boundaries; bad batches are refused."""

import re

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from msa_jax.data.packing import (
    BATCH_KEYS,
    cut_rows,
    join_documents,
    pack_documents,
    padding_share,
    split_document,
    validate_batch,
)


def number_documents(lengths):
    """Documents whose tokens are all different: 1, 2, ... through all of them."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length + 1, end + 1) for end, length in zip(ends, lengths, strict=True)]


def pack(documents, *, sequence_length, block_size, separator_id, seed=0):
    stream = grain.MapDataset.source(documents).to_iter_dataset()
    rows = list(
        pack_documents(
            stream,
            sequence_length=sequence_length,
            block_size=block_size,
            separator_id=separator_id,
            seed=seed,
        )
    )
    return {key: np.stack([row[key] for row in rows]) for key in BATCH_KEYS}


def pieces_of(batch):
    """The (tokens, targets, positions, loss_mask) of each segment."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            slots = ids == segment
            yield tuple(
                batch[key][row][slots] for key in ("tokens", "targets", "positions", "loss_mask")
            )


packings = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    st.sampled_from([(8, 1), (8, 8), (16, 4), (24, 8), (64, 16)]),
    st.sampled_from([None, 0]),
)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(packings)
def test_every_token_once_with_its_successor_as_target(packing):
    lengths, (sequence_length, block_size), separator_id = packing
    documents = number_documents(lengths)
    batch = pack(
        documents, sequence_length=sequence_length, block_size=block_size, separator_id=separator_id
    )
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    validate_batch(batch, block_size)
    pieces = list(pieces_of(batch))
    tokens, targets, _, masks = (np.concatenate(column) for column in zip(*pieces, strict=True))
    last = {document[-1] for document in documents if len(document)}
    first = {document[0] for document in documents if len(document)}
    real = tokens != 0
    assert sorted(tokens[real]) == list(range(1, sum(lengths) + 1))
    for token, target, mask in zip(tokens[real], targets[real], masks[real], strict=True):
        if token in last:
            assert (target, mask) == (0, separator_id is not None)
        else:
            assert (target, mask) == (token + 1, 1)
    if separator_id is None:
        assert real.all()
    else:  # one separator before each document, which predicts its first token
        assert sorted(targets[~real]) == sorted(first)
        assert masks.all()


@pytest.mark.parametrize("length", [8, 16])
def test_cut_rows_are_the_same_tokens_in_pieces_that_start_at_0(length):
    """Documents that end inside a piece, go on over several, and padding."""
    batch = pack(
        number_documents([30, 5, 9, 3, 20]), sequence_length=32, block_size=4, separator_id=0
    )
    cut = cut_rows(batch, length)
    validate_batch(cut, 4)
    for key in ("tokens", "targets", "loss_mask"):
        np.testing.assert_array_equal(cut[key].ravel(), batch[key].ravel())
    for tokens, _, positions, _ in pieces_of(cut):
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    assert cut["positions"].max() == length - 1
    np.testing.assert_array_equal(cut["positions"] == 0, starts(cut) | (cut["segment_ids"] == 0))


def starts(batch):
    """Where pieces begin, from the segment ids alone."""
    ids = batch["segment_ids"]
    return (ids > 0) & np.diff(ids, axis=1, prepend=0).astype(bool)


@pytest.mark.parametrize("separator_id", [None, 0])
def test_joined_rows_are_full_and_hold_every_token_once(separator_id):
    """Short documents, one longer than a row, empty ones, and what is left for the last row."""
    documents = number_documents([5, 0, 40, 1, 7, 3, 16])
    stream = grain.MapDataset.source(documents).to_iter_dataset()
    rows = list(join_documents(stream, sequence_length=16, separator_id=separator_id, seed=0))
    batch = {key: np.stack([row[key] for row in rows]) for key in BATCH_KEYS}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    validate_batch(batch, 16)
    real = batch["segment_ids"] == 1
    assert (batch["segment_ids"][~real] == 0).all()
    assert sorted(real.sum(1))[1:] == [16] * (len(rows) - 1)
    assert (batch["positions"] == np.arange(16) * real).all()
    columns = [batch[key][real] for key in ("tokens", "targets", "loss_mask")]
    for token, target, mask in zip(*columns, strict=True):
        ends = token and any(len(d) and token == d[-1] for d in documents)
        if token == 0:
            assert target == 1 or any(target - 1 == d[-1] for d in documents if len(d))
        elif ends:
            assert (target, mask) == (0, separator_id is not None)
        else:
            assert (target, mask) == (token + 1, 1)
    assert sorted(columns[0][columns[0] > 0]) == list(range(1, 73))
    assert (columns[0] == 0).sum() == (0 if separator_id is None else 6)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(packings)
def test_pieces_start_on_blocks_and_padding_is_behind_them(packing):
    lengths, (sequence_length, block_size), separator_id = packing
    batch = pack(
        number_documents(lengths),
        sequence_length=sequence_length,
        block_size=block_size,
        separator_id=separator_id,
    )
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        used = 0
        for segment in range(1, ids.max() + 1):
            slots = np.flatnonzero(ids == segment)
            assert slots[0] == -(-used // block_size) * block_size
            used = slots[-1] + 1
            np.testing.assert_array_equal(slots, np.arange(slots[0], used))
            np.testing.assert_array_equal(batch["positions"][row, slots], np.arange(len(slots)))
        assert used > 0
        assert not ids[used:].any()
    padding = batch["segment_ids"] == 0
    for key in BATCH_KEYS:
        assert not batch[key][padding].any()
    assert padding_share(batch) == padding.mean()


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(packings)
def test_documents_are_cut_only_where_a_row_ends(packing):
    lengths, (sequence_length, block_size), separator_id = packing
    documents = number_documents(lengths)
    batch = pack(
        documents, sequence_length=sequence_length, block_size=block_size, separator_id=separator_id
    )
    extra = separator_id is not None
    expected = []
    for length in lengths:
        if length:
            whole, rest = divmod(length + extra, sequence_length)
            expected += [sequence_length] * whole + [rest] * (rest > 0)
    assert sorted(len(piece[0]) for piece in pieces_of(batch)) == sorted(expected)


def test_a_cut_does_not_hide_the_next_token():
    pieces = split_document(np.array([5, 6, 7, 8]), sequence_length=2, separator_id=9)
    assert [piece.tolist() for piece in pieces] == [
        [[9, 5, 1], [5, 6, 1]],
        [[6, 7, 1], [7, 8, 1]],
        [[8, 9, 1]],
    ]


def test_row_order_follows_the_seed():
    documents = number_documents([8] * 40)
    options = {"sequence_length": 8, "block_size": 8, "separator_id": None}
    one, same, other = (pack(documents, seed=seed, **options)["tokens"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.tolist() != other.tolist()
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_short_documents_share_rows():
    batch = pack(number_documents([7] * 64), sequence_length=32, block_size=8, separator_id=0)
    assert len(batch["tokens"]) == 16
    assert padding_share(batch) == 0


def test_rows_must_divide_into_blocks():
    with pytest.raises(ValueError, match="sequence_length=12: must be a multiple of block_size=8"):
        pack([np.arange(4)], sequence_length=12, block_size=8, separator_id=None)


def make_batch(segment_ids):
    ids = np.array([segment_ids], np.int32)
    mask = (ids > 0).astype(np.int32)
    return {
        "tokens": mask,
        "targets": mask,
        "segment_ids": ids,
        "positions": np.zeros_like(ids),
        "loss_mask": mask,
    }


@pytest.mark.parametrize(
    "segment_ids",
    [
        [1, 1, 1, 1, 2, 2, 2, 2],
        [1, 1, 1, 0, 2, 0, 0, 0],
        [7, 7, 7, 7, 7, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
)
def test_good_batches_pass(segment_ids):
    validate_batch(make_batch(segment_ids), 4)


@pytest.mark.parametrize(
    ("segment_ids", "problem"),
    [
        ([0, 1, 1, 1, 1, 1, 1, 1], "row 0, slot 0; blocks count from slot 0: pad on the right"),
        ([0, 0, 0, 0, 1, 1, 1, 1], "pad on the right"),
        ([1, 1, 2, 2, 2, 2, 2, 2], "row 0, slot 2, which is not a multiple of block_size=4"),
        ([1, 1, 0, 1, 1, 0, 0, 0], "row 0, slot 3, which is not a multiple of block_size=4"),
        ([1, 1, 1, 0, 1, 1, 0, 0], "id 1 of row 0 names more than one run"),
        ([1, 1, 1, 1, -1, 0, 0, 0], "must be >= 0, but not so at row 0, slot 4"),
        ([1, 1, 1, 1, 1, 1], "rows of 6 slots do not divide into blocks of 4"),
    ],
)
def test_bad_segments_are_refused(segment_ids, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        validate_batch(make_batch(segment_ids), 4)


def test_missing_and_misshapen_arrays_are_refused():
    batch = make_batch([1, 1, 1, 1])
    with pytest.raises(ValueError, match="batch has no positions; it needs tokens, targets"):
        validate_batch({key: batch[key] for key in BATCH_KEYS if key != "positions"}, 4)
    with pytest.raises(ValueError, match=r"one shape \[B, T\].*'targets': \(1, 3\)"):
        validate_batch({**batch, "targets": batch["targets"][:, 1:]}, 4)
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        validate_batch({key: array[0] for key, array in batch.items()}, 4)
    with pytest.raises(ValueError, match="batch\\['positions'\\]: must hold integers"):
        validate_batch({**batch, "positions": batch["positions"] * 0.5}, 4)


@pytest.mark.parametrize("mask", [[1, 1, 2, 0], [1, 1, 1, 1], [1, -1, 0, 0]])
def test_bad_loss_mask_is_refused(mask):
    batch = make_batch([1, 1, 1, 0]) | {"loss_mask": np.array([mask])}
    with pytest.raises(ValueError, match="batch\\['loss_mask'\\]: must be 0 or 1, and 0 in pad"):
        validate_batch(batch, 4)
