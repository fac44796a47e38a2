"""Associative recall: every key comes twice, the second time where the example says."""

import hypothesis
import hypothesis.strategies as st
import pytest

from msa_jax.data.associative_recall import (
    KEYS,
    NOISE,
    VALUES,
    recall_example,
    shortest_recall,
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.integers(1, len(KEYS)), st.integers(0, 301), st.integers(0, 2**32 - 1), st.integers(0, 99)
)
def test_queries_ask_for_every_pair_once(num_pairs, noise, seed, index):
    length = shortest_recall(num_pairs) + noise
    example = recall_example(num_pairs=num_pairs, length=length, seed=seed, index=index)
    text, start = example.text, 2 * num_pairs
    assert len(text) == length
    pairs = dict(zip(text[0:start:2], text[1:start:2], strict=True))
    assert len(pairs) == num_pairs
    assert set(pairs) <= set(KEYS)
    assert set(pairs.values()) <= set(VALUES)
    assert sorted(text[place] for place in example.queries) == sorted(pairs)
    assert example.values == tuple(pairs[text[place]] for place in example.queries)
    assert all(text[place + 1] == pairs[text[place]] for place in example.queries)
    assert example.queries[-1] == length - 2
    assert min(example.queries) >= start
    asked = {place + step for place in example.queries for step in (0, 1)}
    assert {text[place] for place in range(start, length) if place not in asked} <= set(NOISE)


def test_symbols_are_of_one_kind_and_one_byte():
    symbols = KEYS + VALUES + NOISE
    assert len(set(symbols)) == len(symbols) == len(symbols.encode())
    assert len(VALUES) == 32


def test_examples_follow_seed_split_and_index():
    base = {"num_pairs": 8, "length": 100, "seed": 1, "index": 2, "split": "train"}
    example = recall_example(**base)
    assert recall_example(**base) == example
    for change in ({"seed": 2}, {"index": 3}, {"split": "validation"}):
        assert recall_example(**{**base, **change}).text != example.text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_pairs": 0}, "num_pairs=0: must lie between 1 and 52"),
        ({"num_pairs": 53}, "num_pairs=53: must lie between 1 and 52"),
        ({"length": 15}, "length=15: 4 pairs need at least 16"),
    ],
)
def test_bad_arguments_are_refused(change, problem):
    with pytest.raises(ValueError, match=problem):
        recall_example(**{"num_pairs": 4, "length": 20, "seed": 0, "index": 0, **change})
