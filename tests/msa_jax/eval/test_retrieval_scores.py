"""Scores of stub models: one that reads and answers, one that guesses, one that says nothing."""

import re

import numpy as np
import pytest

from msa_jax.data.retrieval import retrieval_example
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.eval.retrieval_scores import score_questions
from msa_jax.eval.scoring import AnswerScores

TOKENIZER = ByteTokenizer()
WIDTH = 400


def ask(answerer, task="passkey", count=12, batch_size=4):
    examples = [
        retrieval_example(task, length=WIDTH - 1, seed=0, index=index) for index in range(count)
    ]
    return score_questions(answerer, TOKENIZER, examples, width=WIDTH, batch_size=batch_size)


def scores_of(answers, candidates, room, log_probs):
    tokens = np.zeros((len(candidates), room), np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = np.frombuffer(answer.encode(), np.uint8)
    return AnswerScores(tokens, log_probs)


def reader(prompts, candidates, room):
    """Finds the pass key in the prompt, says it, and finds it the likeliest."""
    answers = []
    log_probs = np.full(candidates.shape, -5.0)
    for row, prompt in enumerate(prompts):
        assert len(prompt) == WIDTH
        assert prompt[0] == TOKENIZER.separator_id
        text = TOKENIZER.decode(prompt)
        assert text.endswith("The pass key is")
        answers.append(" " + re.search(r"pass key is (\d+)\.", text)[1])
        for place, candidate in enumerate(candidates[row]):
            if TOKENIZER.decode(candidate).startswith(answers[-1]):
                log_probs[row, place] = -0.5
    return scores_of(answers, candidates, room, log_probs)


def guesser(seed):
    rng = np.random.default_rng(seed)

    def guess(prompts, candidates, room):
        answers = [f" {rng.integers(10_000, 100_000)}" for _ in prompts]
        return scores_of(answers, candidates, room, rng.normal(size=candidates.shape) - 3)

    return guess


def test_a_model_that_reads_scores_one():
    scores = ask(reader)
    assert scores == pytest.approx(
        {"exact": 1, "recall": 1, "choice": 1, "mean_rank": 1, "answer_log_prob": -0.5}
    )


def test_a_model_that_guesses_scores_chance():
    scores = ask(guesser(0), count=400, batch_size=100)
    assert scores["exact"] == scores["recall"] == 0
    assert scores["choice"] == pytest.approx(1 / 16, abs=0.04)
    assert scores["mean_rank"] == pytest.approx(8.5, abs=0.8)


def test_a_model_that_finds_all_alike_or_nothing_has_no_choice_right():
    def indifferent(prompts, candidates, room):
        return scores_of([""] * len(prompts), candidates, room, np.zeros(candidates.shape))

    def broken(prompts, candidates, room):
        return scores_of([""] * len(prompts), candidates, room, np.full(candidates.shape, np.nan))

    for model in (indifferent, broken):
        scores = ask(model)
        assert scores["choice"] == scores["exact"] == 0
        assert scores["mean_rank"] == 16


def test_half_an_answer_is_half_recalled_and_not_exact():
    examples = [retrieval_example("multi_value", length=399, seed=0, index=i) for i in range(3)]
    said = iter([f" {', '.join(e.parts[:2])}, nothing" for e in examples])

    def half(prompts, candidates, room):
        answers = [next(said) for _ in prompts]
        return scores_of(answers, candidates, room, np.zeros(candidates.shape))

    scores = score_questions(half, TOKENIZER, examples, width=WIDTH, batch_size=3)
    assert scores["recall"] == 0.5
    assert scores["exact"] == 0


def test_padding_behind_a_candidate_counts_for_nothing():
    def padded(prompts, candidates, room):
        log_probs = np.full(candidates.shape, -1.0)
        log_probs[:, 0, 6:] = -100.0  # behind " 12345"
        log_probs[:, 1:, :6] = -1.1
        return scores_of([""] * len(prompts), candidates, room, log_probs)

    scores = ask(padded)
    assert scores["choice"] == 1
    assert scores["answer_log_prob"] == -1
