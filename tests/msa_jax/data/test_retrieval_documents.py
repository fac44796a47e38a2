"""Synthetic retrieval: the answer is in the prompt, where it should be, and lengths are kept."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest

from msa_jax.data import retrieval
from msa_jax.data.haystack import FILLER
from msa_jax.data.retrieval import retrieval_example, shortest_length
from msa_jax.data.retrieval_tasks import KEYS

SENTENCE = max(map(len, FILLER))
TASKS = ("passkey", "multi_key")

tasks = st.sampled_from(TASKS)
seeds = st.integers(0, 2**32 - 1)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(tasks, seeds, st.integers(0, 10**6), st.integers(300, 5000), st.floats(0, 1))
def test_answer_is_in_the_prompt_at_its_depth(task, seed, index, length, depth):
    example = retrieval_example(task, length=length, seed=seed, index=index, depth=depth)
    context, question = example.prompt.split("\n")
    subject = question.removeprefix("What is ").split("?")[0].removeprefix("the ")
    needle = f"The {subject} is{example.answer}. "
    assert question == f"What is the {subject}? The {subject} is"
    assert example.prompt.count(example.answer) == 1
    assert context.count(needle) == 1
    before = context.index(needle)
    assert example.depth == pytest.approx(before / (len(context) - len(needle)))
    assert abs(before - depth * (len(context) - len(needle))) <= SENTENCE / 2
    assert length - SENTENCE <= len(example.document) <= length
    assert example.document == example.prompt + example.answer


@pytest.mark.parametrize("depth", [0.0, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_ends_of_the_text_are_reached(task, depth):
    example = retrieval_example(task, length=2000, seed=0, index=0, depth=depth)
    context = example.prompt.split("\n")[0]
    assert example.depth == depth
    code = context.index(example.answer) / len(context)
    assert code < 0.02 if depth == 0 else code > 0.98


@pytest.mark.parametrize("task", TASKS)
def test_depths_of_one_example_differ_in_nothing_else(task):
    examples = [
        retrieval_example(task, length=800, seed=5, index=6, depth=depth)
        for depth in (None, 0.0, 0.5, 1.0)
    ]
    assert len({example.prompt for example in examples}) >= 3
    assert len({example.answer for example in examples}) == 1
    words = {tuple(sorted(example.prompt.split())) for example in examples}
    assert len(words) == 1


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(seeds, st.integers(1, len(KEYS)))
def test_keys_and_codes_are_distinct(seed, num_keys):
    example = retrieval_example("multi_key", length=3000, seed=seed, index=0, num_keys=num_keys)
    context = example.prompt.split("\n")[0]
    needles = [sentence for sentence in context.split(". ") if " key is " in sentence]
    names, codes = zip(*(needle.split(" key is ") for needle in needles), strict=True)
    assert len(set(names)) == len(set(codes)) == num_keys


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_seed_split_and_index(task):
    base = {"length": 500, "seed": 1, "index": 2, "split": "train"}
    example = retrieval_example(task, **base)
    assert retrieval_example(task, **base) == example
    for change in ({"seed": 2}, {"index": 3}, {"split": "validation"}):
        other = retrieval_example(task, **{**base, **change})
        assert other.answer != example.answer
        assert other.prompt != example.prompt
    depths = [retrieval_example(task, **{**base, "index": i}).depth for i in range(50)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


@pytest.mark.parametrize("task", TASKS)
def test_length_can_be_counted_in_tokens(task):
    def count_words(text):
        return len(text.split())

    for index in range(5):
        example = retrieval_example(task, length=400, seed=0, index=index, measure=count_words)
        assert 400 - 15 <= count_words(example.document) <= 400


@pytest.mark.parametrize("task", TASKS)
def test_a_measure_that_does_not_add_up_is_still_kept(task):
    def count_with_joints(text):  # a sentence behind another one costs two more
        return len(text) + 2 * len(re.findall(r"\. .", text))

    example = retrieval_example(task, length=900, seed=0, index=0, measure=count_with_joints)
    assert 800 <= count_with_joints(example.document) <= 900


@pytest.mark.parametrize("task", TASKS)
def test_shortest_example_has_no_filler(task):
    shortest = shortest_length(task)
    for index in range(20):
        example = retrieval_example(task, length=shortest, seed=0, index=index, depth=0.5)
        assert len(example.document) == shortest
        assert example.prompt.startswith("The ")
    with pytest.raises(ValueError, match=f"length={shortest - 1}: .* at least {shortest}"):
        retrieval_example(task, length=shortest - 1, seed=0, index=0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"depth": 1.5}, "depth=1.5: must lie between 0"),
        ({"num_keys": 0}, "num_keys=0: must lie between 1 and"),
        ({"num_keys": len(KEYS) + 1}, "must lie between 1 and"),
    ],
)
def test_bad_arguments_are_refused(change, problem):
    with pytest.raises(ValueError, match=problem):
        retrieval_example("multi_key", length=1000, seed=0, index=0, **change)


def test_unknown_task_is_refused():
    # By the function behind the public ones: tests check those against their annotations first.
    with pytest.raises(ValueError, match="task='needle': choose one of passkey, multi_key"):
        retrieval._check("needle", None, 4)
