"""Every task's answer follows from its text alone, and its wrong answers are wrong."""

import collections
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from msa_jax.data.haystack import FILLER, Haystack
from msa_jax.data.retrieval import TASKS, retrieval_example, shortest_length
from msa_jax.data.retrieval_tasks import NEEDLE_TASKS, NUM_WRONG, WORD_TASKS

SENTENCE = max(map(len, FILLER))

seeds, indices = st.integers(0, 2**32 - 1), st.integers(0, 10**6)


def solve(task, prompt):
    """The answer, by reading the text as a person would."""
    context, _, question = prompt.rpartition("\n")
    codes = re.findall(r"The (\w+) key is (\d+)\. ", context)
    if task == "passkey":
        return re.findall(r"The pass key is (\d+)\. ", context)
    if task == "multi_key":
        asked = re.search(r"What is the (\w+) key", question)[1]
        return [dict(codes)[asked]]
    if task == "multi_value":
        asked = re.search(r"all the (\w+) keys", question)[1]
        return [code for key, code in codes if key == asked]
    if task == "multi_query":
        asked = re.search(r"the keys (.*)\?", question)[1].split(" and ")
        return [dict(codes)[key] for key in asked]
    if task == "variable_tracking":
        values = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\. ", context):
            values[name] = values.get(source, source)
        asked = re.search(r"hold (\d+)\?", question)[1]
        return [name for name, value in values.items() if value == asked]
    if task == "question_answering":
        towns = dict(re.findall(r"(\w+) lives in (\w+)\. ", context))
        colleagues = dict(re.findall(r"(\w+) works with (\w+)\. ", context))
        who = re.search(r"(?:of|does) (\w+) live", question)[1]
        return [towns[colleagues[who] if "colleague" in question else who]]
    if task == "many_needles":
        asked = re.search(r"What is the ([a-z ]+ key)", question)[1]
        return re.findall(rf"The {asked} is (\d+)\. ", context)
    if task == "associative_recall":
        return [prompt[prompt.index(prompt[-1]) + 1]]
    ranked = collections.Counter(context.split()).most_common()
    words = [word for word, _ in ranked[:3]]
    assert ranked[2][1] > ranked[3][1], "the third word is not in doubt"
    if task == "frequent_words":
        assert ranked[0][1] > ranked[1][1] > ranked[2][1]
        return words
    return sorted(words)


def text_of(task, parts):
    return parts[0] if task == "associative_recall" else f" {', '.join(parts)}"


@pytest.mark.parametrize("task", TASKS)
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=seeds, index=indices, length=st.integers(330, 2000))
def test_the_answer_follows_from_the_text(task, seed, index, length):
    example = retrieval_example(task, length=length, seed=seed, index=index)
    assert example.answer == text_of(task, solve(task, example.prompt))
    assert example.answer == text_of(task, example.parts)
    assert len(set(example.wrong)) == NUM_WRONG
    assert example.answer not in example.wrong
    assert {len(text) for text in example.wrong} == {len(example.answer)}
    assert length - SENTENCE <= len(example.document) <= length


@pytest.mark.parametrize("task", sorted({*TASKS, "mixture"} - {"passkey", "multi_key"}))
def test_examples_follow_seed_split_and_index(task):
    base = {"length": 400, "seed": 1, "index": 2, "split": "train"}
    example = retrieval_example(task, **base)
    assert retrieval_example(task, **base) == example
    for change in ({"seed": 2}, {"index": 3}, {"split": "validation"}):
        assert retrieval_example(task, **{**base, **change}).prompt != example.prompt


@pytest.mark.parametrize("task", sorted({*TASKS} - {"associative_recall"}))
def test_the_shortest_example_fits_whatever_is_drawn(task):
    shortest = shortest_length(task)
    for index in range(30):
        example = retrieval_example(task, length=shortest, seed=0, index=index)
        assert shortest - SENTENCE <= len(example.document) <= shortest
    with pytest.raises(ValueError, match=f"length={shortest - 1}: .* at least {shortest}"):
        retrieval_example(task, length=shortest - 1, seed=0, index=0)


def test_the_mixture_is_of_all_tasks_alike():
    def task_of(prompt):
        if prompt.count("What is") > 1:
            return "many_needles"
        return next((name for name, word in MARKS.items() if word in prompt), "associative_recall")

    counts = collections.Counter(
        task_of(retrieval_example("mixture", length=400, seed=0, index=index).prompt)
        for index in range(450)
    )
    assert set(counts) == set(TASKS)
    assert min(counts.values()) > 25


MARKS = {
    "passkey": "What is the pass key",
    "multi_key": "What is the ",
    "multi_value": "What are all",
    "multi_query": "What are the keys",
    "variable_tracking": "Which variables",
    "question_answering": "live? The town",
    "common_words": "most common words",
    "frequent_words": "most frequent words",
}


@pytest.mark.parametrize("task", [*NEEDLE_TASKS, *WORD_TASKS])
def test_words_are_counted_by_any_measure(task):
    def tokens(text):  # about three characters each, as a trained tokenizer's
        return -(-len(text) // 3)

    example = retrieval_example(task, length=400, seed=0, index=0, measure=tokens)
    assert 350 <= tokens(example.document) <= 400


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_behind_the_first_one(depth):
    example = retrieval_example("multi_value", length=3000, seed=3, index=0, depth=depth)
    context = example.prompt.rpartition("\n")[0]
    starts = [context.index(code) / len(context) for code in example.parts]
    assert starts == sorted(starts)
    assert starts[0] == pytest.approx(depth, abs=0.05)
    assert example.depth == pytest.approx(depth, abs=0.05)


def test_a_haystack_of_text_is_read_in_order_and_never_answers():
    pieces = [
        f"line {number}: 12345\n" if number % 3 else f"line {number}\n" for number in range(90)
    ]
    haystack = Haystack(pieces, in_order=True)
    example = retrieval_example("passkey", length=900, seed=0, index=5, haystack=haystack)
    context = example.prompt.rpartition("\n")[0]
    numbers = [int(number) for number in re.findall(r"line (\d+)", context)]
    assert numbers == [(numbers[0] + place) % 90 for place in range(len(numbers))]
    assert 900 - 20 <= len(example.document) <= 900
    starts = {
        retrieval_example("passkey", length=200, seed=0, index=index, haystack=haystack).prompt[:8]
        for index in range(20)
    }
    assert len(starts) > 10
    spoilt = Haystack([f"The pass key is not{example.answer}. "], in_order=True)
    again = retrieval_example("passkey", length=900, seed=0, index=5, haystack=spoilt)
    assert again.answer == example.answer
    assert again.prompt.count(again.answer) == 1


def test_a_haystack_shorter_than_the_text_begins_again():
    haystack = Haystack(["one. ", "two. "], in_order=True)
    context = retrieval_example("passkey", length=500, seed=0, index=0, haystack=haystack).prompt
    assert context.count("one. ") > 20
    assert abs(context.count("one. ") - context.count("two. ")) <= 1


@pytest.mark.parametrize("length", [88, 279, 600, 8191, 80_000])
@pytest.mark.parametrize("depth", [None, 0.0, 0.6])
def test_many_needles_stand_once_each_before_their_questions(length, depth):
    distances = []
    for index in range(3):
        example = retrieval_example(
            "many_needles", length=length, seed=2, index=index, split="train", depth=depth
        )
        text = example.document
        needles = re.findall(r"The ([a-z ]+ key) is (\d{5})\. ", text)
        asked = re.findall(r"\nWhat is the ([a-z ]+ key)\? The ([a-z ]+ key) is (\d{5})", text)
        assert len(needles) == min(max(1, length // 280), 257)
        assert len(dict(needles)) == len({code for _, code in needles}) == len(needles)
        times = collections.Counter((name, code) for name, _, code in asked)
        assert times == dict.fromkeys(needles, 3 if length >= 280 else 1)
        assert all(name == again for name, again, _ in asked)
        for name, code in needles:
            told = text.index(f"The {name} is {code}. ")
            distances.append(text.index(f"\nWhat is the {name}?") - told)
        assert text.endswith(f"The {asked[-1][0]} is{example.answer}")
        assert length - 70 <= len(text) <= length
        if depth is not None and length > 8000:  # by the filler, of which there is a quarter
            assert example.depth == pytest.approx(depth, abs=0.3)
    assert min(distances) > 0
    if length == 8191:
        assert 0.2 < np.mean(np.array(distances) < 200) < 0.6
        assert np.mean(np.array(distances) > 2000) > 0.08
