"""Streams of text: the same tokens in windows of any length, many documents, none of them whole."""

import dataclasses

import numpy as np
import pytest
from tiny_runs import CONFIG

from msa_jax.config import ConfigError
from msa_jax.data.corpus import open_corpus
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.eval.texts import VALIDATION, read_haystack, read_stream

TOKENIZER = ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    """Twenty documents of 100 to 2,000 bytes, each of a letter of its own."""
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(chr(ord("a") + index) * 100 * (index + 1))
    return f"{tmp_path}/*.txt"


def data(files="*.none"):
    return dataclasses.replace(CONFIG.data, files=files, validation_fraction=0.5)


def test_windows_of_any_length_hold_the_same_tokens(corpus):
    stream = read_stream(data(), TOKENIZER, corpus, num_tokens=1024)
    assert len(stream.tokens) == 1025
    for length in (64, 256, 1024):
        tokens, targets = stream.windows(length)
        assert tokens.shape == targets.shape == (1024 // length, length)
        np.testing.assert_array_equal(tokens.ravel(), stream.tokens[:-1])
        np.testing.assert_array_equal(targets.ravel(), stream.tokens[1:])
    assert stream.windows(1000)[0].shape == (1, 1000)
    assert stream.windows(1025)[0].shape == (0, 1025)


def test_the_longest_documents_share_a_stream(corpus):
    stream = read_stream(data(), TOKENIZER, corpus, num_tokens=1024)
    starts = np.flatnonzero(stream.tokens == TOKENIZER.separator_id)
    assert starts.tolist() == [*range(0, 1024, 128)]
    assert TOKENIZER.decode(stream.tokens[starts + 1]) == "tsrqponm"


def test_few_documents_give_more_of_themselves(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 3000)
    (tmp_path / "b.txt").write_text("b" * 3000)
    stream = read_stream(data(), TOKENIZER, f"{tmp_path}/*.txt", num_tokens=1024)
    starts = np.flatnonzero(stream.tokens == TOKENIZER.separator_id)
    assert starts.tolist() == [0, 512]
    assert len(stream.tokens) == 1025


def test_validation_is_the_held_out_part(corpus):
    held_out = read_stream(data(corpus), TOKENIZER, VALIDATION, num_tokens=100_000)
    everything = read_stream(data(), TOKENIZER, corpus, num_tokens=100_000)
    assert 0 < len(held_out.tokens) < len(everything.tokens) == 21_020
    documents = {document for chunk in open_corpus(data(corpus))[1] for document in chunk}
    text = "".join(chr(token) for token in held_out.tokens)
    assert set(text.split(chr(255))[1:]) == documents
    again = read_stream(data(corpus), TOKENIZER, VALIDATION, num_tokens=100_000)
    np.testing.assert_array_equal(held_out.tokens, again.tokens)


def test_a_haystack_is_lines_in_order_and_parts_of_long_ones(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n" + "x" * 250)
    haystack = read_haystack(data(), len, f"{tmp_path}/*.txt", num_bytes=10)
    assert haystack.pieces == ("one\n", "two\n", "x" * 100, "x" * 100, "x" * 50)
    assert haystack.in_order


def test_missing_text_is_said_in_a_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--text=.*nothing\*: matches no file"):
        read_stream(data(), TOKENIZER, f"{tmp_path}/nothing*", num_tokens=10)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"--text=.*empty.txt: the files hold no text"):
        read_stream(data(), TOKENIZER, f"{tmp_path}/empty.txt", num_tokens=10)
    retrieval = dataclasses.replace(CONFIG.data, source="retrieval")
    with pytest.raises(ConfigError, match="has no held-out text: name files, --text=GLOB"):
        read_stream(retrieval, TOKENIZER, VALIDATION, num_tokens=10)
