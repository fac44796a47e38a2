"""The pipeline: deterministic, restorable to the bit, reshuffled epochs, parts kept apart."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from msa_jax.config import ConfigError
from msa_jax.data import packing, pipeline
from msa_jax.data.corpus import open_corpus
from msa_jax.data.haystack import FILLER
from msa_jax.data.packing import BATCH_KEYS, padding_share, validate_batch
from msa_jax.data.pipeline import train_iterator, validation_batches, vocab_size
from msa_jax.data.retrieval import shortest_length
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.train.config import DataConfig

BLOCK = 16


def digest(batch):
    content = b"".join(np.ascontiguousarray(batch[key]).tobytes() for key in BATCH_KEYS)
    return hashlib.sha256(content).hexdigest()


def take(iterator, count):
    return [digest(batch) for batch in itertools.islice(iterator, count)]


def through_json(state):
    return json.loads(json.dumps(state))


def documents_of(batches):
    """The texts of all segments that are whole documents (they start at a separator)."""
    tokenizer = ByteTokenizer()
    for batch in batches:
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, ids.max() + 1):
                yield tokenizer.decode(tokens[ids == segment])


@pytest.fixture
def small_pool(monkeypatch):
    """Eight rows in the pool: several pools, and epochs of the small corpora, go by quickly."""
    monkeypatch.setattr(packing, "POOL_ROWS", (8, 8))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six `.jsonl` files of forty short records, each with a text of its own."""
    folder = tmp_path_factory.mktemp("records")
    for name in "abcdef":
        lines = [json.dumps({"text": f"{name}{i} " * (1 + i % 7)}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return DataConfig(
        source="files",
        files=str(folder / "*.jsonl"),
        sequence_length=64,
        batch_size=4,
        validation_fraction=0.3,
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"join_documents": True},
        {"retrieval_share": 0.3, "sequence_length": 512},
        {"retrieval_share": 1.0, "sequence_length": 512},
        {"source": "retrieval", "retrieval_task": "multi_key", "sequence_length": 1024},
        {"source": "retrieval", "retrieval_task": "mixture", "sequence_length": 512},
    ],
    ids=["stdlib", "joined", "mixed", "synthetic alone", "retrieval", "mixture"],
)
def test_batches_have_the_promised_form(change):
    config = DataConfig(**{"sequence_length": 256, "batch_size": 4, **change})
    iterator = train_iterator(config, block_size=BLOCK)
    for batch in [
        next(iterator),
        next(iterator),
        *validation_batches(config, block_size=BLOCK, num_batches=2),
    ]:
        assert set(batch) == set(BATCH_KEYS)
        assert {array.shape for array in batch.values()} == {(4, config.sequence_length)}
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        validate_batch(batch, BLOCK)
        assert max(batch["tokens"].max(), batch["targets"].max()) < vocab_size(config)


def test_padding_of_the_default_corpus_is_rare():
    config = DataConfig(sequence_length=1024, batch_size=64)
    assert padding_share(next(train_iterator(config, block_size=128))) < 0.02


@pytest.mark.usefixtures("small_pool")
def test_order_follows_the_seed(records):
    def head(seed):
        config = DataConfig(**{**vars(records), "seed": seed})
        return take(train_iterator(config, block_size=BLOCK), 5)

    assert head(3) == head(3)
    assert head(3) != head(4)
    assert head(2**32 - 1)
    with pytest.raises(ConfigError, match=r"data\.seed=-1: must be between"):
        head(-1)


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize(
    ("retrieval_share", "joined", "prefetch"),
    [
        (0.0, False, 0),
        (0.4, False, 0),
        (1.0, False, 0),
        (0.0, True, 0),
        (0.4, True, 0),
        (0.4, True, 5),
    ],
)
def test_restored_iterator_goes_on_to_the_bit(records, retrieval_share, joined, prefetch):
    changes = {"retrieval_share": retrieval_share, "join_documents": joined}
    config = DataConfig(**{**vars(records), **changes, "sequence_length": 256})
    iterator = train_iterator(config, block_size=BLOCK, prefetch=prefetch)
    states, expected = [through_json(iterator.get_state())], []
    for _ in range(40):  # several epochs and many pools; a batch is half a pool
        expected += take(iterator, 1)
        states.append(through_json(iterator.get_state()))
    expected += take(iterator, 3)
    assert len(set(expected)) == len(expected)
    for step in (0, 1, 2, 7, 16, 33, 40):
        fresh = train_iterator(config, block_size=BLOCK, prefetch=prefetch)
        fresh.set_state(states[step])
        assert through_json(fresh.get_state()) == states[step]
        assert take(fresh, 3) == expected[step : step + 3]
        fresh.close()
    iterator.close()


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(used=st.integers(0, 30), step=st.integers(0, 30), rows=st.integers(1, 8))
def test_a_used_iterator_can_be_set_back_or_forth(records, used, step, rows):
    config = DataConfig(**{**vars(records), "batch_size": rows})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "POOL_ROWS", (8, 8))
        reference = train_iterator(config, block_size=BLOCK)
        take(reference, step)
        state = reference.get_state()
        saved = through_json(state)
        expected = take(reference, 4)
        assert state == saved  # a state that was handed out does not move on
        iterator = train_iterator(config, block_size=BLOCK)
        take(iterator, used)
        iterator.set_state(saved)
        assert take(iterator, 4) == expected


def test_restored_in_another_process_mid_epoch(tmp_path):
    config = DataConfig(sequence_length=128, batch_size=2, retrieval_share=0.2)
    iterator = train_iterator(config, block_size=BLOCK)
    take(iterator, 3)
    (tmp_path / "state.json").write_text(json.dumps(iterator.get_state()))
    script = (
        "import json, pathlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from test_data_pipeline import BLOCK, DataConfig, take, train_iterator\n"
        "config = DataConfig(sequence_length=128, batch_size=2, retrieval_share=0.2)\n"
        "iterator = train_iterator(config, block_size=BLOCK)\n"
        "iterator.set_state(json.loads(pathlib.Path(sys.argv[2]).read_text()))\n"
        "print(*take(iterator, 3))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path / "state.json")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert result.stdout.split() == take(iterator, 3)


def test_state_of_another_corpus_is_refused(records, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text")
    config = DataConfig(**{**vars(records), "files": str(tmp_path / "*.txt")})
    iterator = train_iterator(config, block_size=BLOCK)
    state = iterator.get_state()
    iterator.set_state(state)
    (tmp_path / "a.txt").write_text("some more text")
    with pytest.raises(ConfigError, match="corpus is not the one of the saved state"):
        train_iterator(config, block_size=BLOCK).set_state(state)


def test_epochs_hold_every_document_once_in_new_orders(records):
    training = open_corpus(records)[0]
    expected = [text for chunk in training for text in chunk]

    def read_epochs(seed, count):
        config = DataConfig(**{**vars(records), "seed": seed})
        stream = iter(pipeline._documents(pipeline._source(training, config).repeat(), seed))
        return [list(itertools.islice(stream, len(expected))) for _ in range(count)]

    def chunk_order(epoch):
        return tuple(dict.fromkeys(text[0] for text in epoch))

    epochs = read_epochs(0, 3)
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected)
    assert len({tuple(epoch) for epoch in [expected, *epochs]}) == 4
    # The chunks change their order, from epoch to epoch and by the seed, and so do the records of
    # a chunk.
    assert len({chunk_order(epoch) for epoch in epochs}) > 1
    assert len({chunk_order(read_epochs(seed, 1)[0]) for seed in range(4)}) > 1
    inside = [[text for text in epoch if text.startswith(expected[0][0])] for epoch in epochs]
    assert len({tuple(order) for order in inside}) == 3


@pytest.mark.usefixtures("small_pool")
def test_training_and_validation_share_no_document(records):
    training, validation = (
        {text for chunk in part for text in chunk} for part in open_corpus(records)
    )
    batches = itertools.islice(train_iterator(records, block_size=BLOCK), 200)
    assert set(documents_of(batches)) == training
    batches = validation_batches(records, block_size=BLOCK, num_batches=10**6)
    assert sorted(documents_of(batches)) == sorted(validation)


@pytest.mark.usefixtures("small_pool")
def test_batches_packed_ahead_are_the_same_and_their_thread_ends(records):
    def packing_threads():
        return [one for one in threading.enumerate() if "prefetch" in one.name]

    expected = take(train_iterator(records, block_size=BLOCK), 12)
    iterator = train_iterator(records, block_size=BLOCK, prefetch=4)
    assert not packing_threads()
    assert take(iterator, 12) == expected
    assert len(packing_threads()) == 1
    iterator.close()
    assert not packing_threads()


def test_validation_is_the_same_every_time_and_ends_with_padding(records):
    batches = list(validation_batches(records, block_size=BLOCK, num_batches=10**6))
    again = validation_batches(records, block_size=BLOCK, num_batches=10**6)
    assert [digest(batch) for batch in batches] == take(again, 10**6)
    head = validation_batches(records, block_size=BLOCK, num_batches=3)
    assert take(head, 10**6) == [digest(batch) for batch in batches[:3]]
    assert {batch["tokens"].shape for batch in batches} == {(4, 64)}
    odd = DataConfig(**{**vars(records), "batch_size": 1 + sum(len(b["tokens"]) for b in batches)})
    (batch,) = validation_batches(odd, block_size=BLOCK, num_batches=5)
    validate_batch(batch, BLOCK)
    assert not any(array[-1].any() for array in batch.values())


@pytest.mark.usefixtures("small_pool")
def test_processes_share_the_rows_of_a_batch(records):
    whole = next(train_iterator(records, block_size=BLOCK, process_index=0, process_count=1))
    shares = [
        train_iterator(records, block_size=BLOCK, process_index=index, process_count=2)
        for index in (0, 1)
    ]
    halves = [next(share) for share in shares]
    for key in BATCH_KEYS:
        np.testing.assert_array_equal(whole[key], np.concatenate([half[key] for half in halves]))
    assert shares[0].get_state() == shares[1].get_state()
    (whole,) = validation_batches(records, block_size=BLOCK, num_batches=1)
    (part,) = validation_batches(
        records, block_size=BLOCK, num_batches=1, process_index=1, process_count=2
    )
    np.testing.assert_array_equal(part["tokens"], whole["tokens"][2:])
    with pytest.raises(ConfigError, match=r"data\.batch_size=4: must be a multiple .* 3"):
        train_iterator(records, block_size=BLOCK, process_index=0, process_count=3)


@pytest.mark.usefixtures("small_pool")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("joined", [False, True])
def test_retrieval_share_is_of_rows(records, share, joined):
    """Of the rows of every few batches, however long the documents of the corpus are."""
    changes = {"retrieval_share": share, "sequence_length": 256, "join_documents": joined}
    iterator = train_iterator(DataConfig(**{**vars(records), **changes}), block_size=BLOCK)
    rows = [row for batch in itertools.islice(iterator, 40) for row in batch["tokens"]]
    texts = [ByteTokenizer().decode(row) for row in rows]
    synthetic = np.array([any(word in text for word in ("pass key", *FILLER)) for text in texts])
    natural = np.array([re.search(r"[a-f]\d+ [a-f]\d", text) is not None for text in texts])
    assert not (synthetic & natural).any()
    tens = synthetic.reshape(-1, 10).sum(1)  # of each ten rows
    assert np.abs(tens - 10 * share).max() <= 1


def test_retrieval_documents_end_with_the_answer_at_many_lengths():
    """As many tokens in each octave of lengths."""
    config = DataConfig(source="retrieval", sequence_length=1024, batch_size=8)
    texts = list(documents_of(itertools.islice(train_iterator(config, block_size=BLOCK), 60)))
    for text in texts:
        answer = text.rpartition(" ")[2]
        assert text.count(f"The pass key is {answer}") == 2
    lengths = np.array([len(text) for text in texts])
    assert lengths.min() < 80
    assert 1000 < lengths.max() < 1024
    edges = np.geomspace(shortest_length("passkey"), 1023, 5)
    shares = np.histogram(lengths, edges, weights=lengths)[0] / lengths.sum()
    np.testing.assert_allclose(shares, 0.25, atol=0.1)  # texts end with whole sentences
    held_out = validation_batches(config, block_size=BLOCK, num_batches=10)
    long = {text for text in texts if len(text) > 300}  # short ones are few, and meet by chance
    assert not long & set(documents_of(held_out))


def test_row_must_hold_a_retrieval_document_and_its_separator():
    shortest = shortest_length("passkey")
    config = DataConfig(source="retrieval", sequence_length=shortest)
    with pytest.raises(ConfigError, match=f"sequence_length={shortest}: must be .* {shortest + 1}"):
        train_iterator(config, block_size=1)
    config = DataConfig(source="retrieval", sequence_length=shortest + 1)
    batch = next(train_iterator(config, block_size=1))
    assert padding_share(batch) == 0
    assert batch["segment_ids"].max() == 1


def test_errors_of_the_corpus_come_through(records, tmp_path):
    config = DataConfig(**{**vars(records), "files": str(tmp_path / "*.txt")})
    with pytest.raises(ConfigError, match=r"data\.files=.*matches no file"):
        validation_batches(config, block_size=BLOCK, num_batches=1)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text")
    iterator = train_iterator(config, block_size=BLOCK)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"data\.files=.*is not UTF-8"):
        next(iterator)
    with pytest.raises(ValueError, match="sequence_length=64: must be a multiple of block_size=7"):
        validation_batches(records, block_size=7, num_batches=1)
    with pytest.raises(ConfigError, match=r"data\.tokenizer="):
        train_iterator(DataConfig(tokenizer="nowhere.json"), block_size=BLOCK)
