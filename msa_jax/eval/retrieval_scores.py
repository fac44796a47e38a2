"""How a model does where the answer stands in the prompt: needles, RULER's tasks, recall of pairs.

A question is scored in two ways. *Exact*: the greedy continuation is the right answer, token by
token. *Choice*: the right answer is more likely than every one of 15 wrong ones of the same form,
which small models reach long before they answer; chance is 1 in 16.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from msa_jax.data.associative_recall import KEYS, NOISE, VALUES, recall_example, shortest_recall
from msa_jax.data.haystack import FILLER
from msa_jax.data.retrieval import RetrievalExample, retrieval_example, shortest_length
from msa_jax.data.tokenizer import Tokenizer, encode_prompt
from msa_jax.eval.scoring import AnswerScores, choose_tokens, score_answers
from msa_jax.eval.subject import CannotMeasure, Subject
from msa_jax.train.config import RetrievalTask

# Room behind a prompt: enough for four codes spelt byte by byte. One number for all tasks: a length
# is compiled once.
_ROOM = 32

# Prompts [B, T], candidate answers [B, C, A] and how many tokens to decode, to what a model makes
# of them.
Answerer = Callable[[np.ndarray, np.ndarray, int], AnswerScores]


def needle(subject: Subject, task: RetrievalTask, length: int) -> dict[str, Any]:
    """Scores of `task` by depth of the needle; the same questions at every depth.

    Returns:
      `depths` [D], and by name of `score_questions` the means [D].

    Raises:
      CannotMeasure: the length is too short for the task.
    """
    depths = np.linspace(0, 1, subject.settings.depths) if subject.settings.depths > 1 else [0.5]
    found = [_cell(subject, task, length, float(depth)) for depth in depths]
    values = {name: [scores[name] for scores in found] for name in found[0]}
    return {"depths": [float(depth) for depth in depths], **values}


def ruler(subject: Subject, task: RetrievalTask, length: int) -> dict[str, float]:
    """Scores of one of RULER's tasks, by name of `score_questions`.

    Raises:
      CannotMeasure: the length is too short for the task.
    """
    return _cell(subject, task, length, None)


def associative_recall(subject: Subject, length: int) -> dict[str, Any]:
    """Accuracy of associative recall by number of pairs.

    Returns:
      `pairs` [P]; `accuracy` [P]: share of queries whose likeliest next token is the right value;
      `choice` [P]: whose likeliest value is, chance being 1 in 32. None where the pairs do not fit.

    Raises:
      CannotMeasure: no number of pairs fits, or the tokenizer has no token for a symbol.
    """
    symbols = _symbol_ids(subject.tokenizer)
    fitting = [pairs for pairs in subject.settings.pairs if shortest_recall(pairs) < length]
    if not fitting:
        raise CannotMeasure("no number of pairs fits")
    accuracy, choice = [], []
    for pairs in subject.settings.pairs:
        right = _recall_scores(subject, symbols, pairs, length) if pairs in fitting else None
        accuracy.append(None if right is None else float(right[0].mean()))
        choice.append(None if right is None else float(right[1].mean()))
    return {"pairs": list(subject.settings.pairs), "accuracy": accuracy, "choice": choice}


def score_questions(
    answerer: Answerer,
    tokenizer: Tokenizer,
    examples: Sequence[RetrievalExample],
    *,
    width: int,
    batch_size: int,
) -> dict[str, float]:
    """Asks questions whose prompts are made `width` tokens long.

    What a prompt lacks is filled up in front, behind the separator, with filler sentences: all
    prompts of a length then are one compiled program, and no mixer has to skip padding.

    Returns:
      Means: `exact`, the greedy continuation begins with the right answer's tokens; `recall`, the
      share of the answer's parts that the continuation spells (RULER's score); `choice`, the right
      answer is likelier than all wrong ones; `mean_rank`, its place among all, 1 the best;
      `answer_log_prob`, nats per token of the right answer.
    """
    answers = [
        [tokenizer.encode(text) for text in (example.answer, *example.wrong)]
        for example in examples
    ]
    room = max(_ROOM, *(len(ids) for texts in answers for ids in texts))
    prompts = np.stack([_fill_front(tokenizer, example.prompt, width) for example in examples])
    results = []
    for start in range(0, len(examples), batch_size):
        rows = slice(start, start + batch_size)
        candidates = np.zeros((len(prompts[rows]), len(answers[0]), room), np.int32)
        for row, texts in zip(candidates, answers[rows], strict=True):
            for candidate, ids in zip(row, texts, strict=True):
                candidate[: len(ids)] = ids
        scores = answerer(prompts[rows], candidates, room)
        for place, texts in enumerate(answers[rows]):
            results.append(
                _score(
                    tokenizer,
                    examples[start + place],
                    texts,
                    np.asarray(scores.tokens[place]),
                    np.asarray(scores.log_probs[place], np.float64),
                )
            )
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


def _score(
    tokenizer: Tokenizer,
    example: RetrievalExample,
    answers: Sequence[np.ndarray],
    tokens: np.ndarray,
    log_probs: np.ndarray,
) -> dict[str, float]:
    """One question's scores; `answers` are the right one and then the wrong ones."""
    sums = [
        values[: len(ids)].sum() if np.isfinite(values[: len(ids)]).all() else -np.inf
        for values, ids in zip(log_probs, answers, strict=True)
    ]
    # What is as likely as the right answer counts as likelier: a model that says nothing is wrong.
    rank = 1 + sum(value >= sums[0] for value in sums[1:])
    said = tokenizer.decode(tokens)
    return {
        "exact": float(np.array_equal(tokens[: len(answers[0])], answers[0])),
        "recall": sum(part in said for part in example.parts) / len(example.parts),
        "choice": float(rank == 1),
        "mean_rank": rank,
        "answer_log_prob": sums[0] / len(answers[0]),
    }


def _cell(
    subject: Subject, task: RetrievalTask, length: int, depth: float | None
) -> dict[str, float]:
    settings, width = subject.settings, length - _ROOM
    shortest = shortest_length(task)
    if width - 1 < shortest:
        raise CannotMeasure(f"needs at least {shortest + 1 + _ROOM} tokens")
    examples = [
        retrieval_example(
            task,
            length=width - 1,  # a separator stands before it
            seed=settings.seed,
            index=index,
            depth=depth,
            measure=subject.count_tokens,
            haystack=subject.haystack,
        )
        for index in range(settings.examples)
    ]

    def answer(prompts: np.ndarray, candidates: np.ndarray, room: int) -> AnswerScores:
        return score_answers(subject.model, prompts, candidates, max_new_tokens=room)

    return score_questions(
        answer,
        subject.tokenizer,
        examples,
        width=width,
        batch_size=settings.batch_size(length, settings.examples),
    )


def _fill_front(tokenizer: Tokenizer, prompt: str, width: int) -> np.ndarray:
    """The prompt's ids [width], with the end of filler sentences between separator and text."""
    ids = encode_prompt(tokenizer, prompt)
    filler = tokenizer.encode("".join(FILLER))
    start = 0 if tokenizer.separator_id is None else 1
    return np.insert(ids, start, np.resize(filler[::-1], width - len(ids))[::-1])


def _symbol_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {symbol: tokenizer.encode(symbol) for symbol in KEYS + VALUES + NOISE}
    if any(len(found) != 1 for found in ids.values()):
        raise CannotMeasure("the tokenizer splits a symbol into several tokens")
    return {symbol: int(found[0]) for symbol, found in ids.items()}


def _recall_scores(
    subject: Subject, symbols: dict[str, int], pairs: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of all queries: whether the value is the likeliest token, and the likeliest value."""
    settings = subject.settings
    separator = subject.tokenizer.separator_id
    start = [] if separator is None else [separator]
    make = partial(recall_example, num_pairs=pairs, length=length - len(start), seed=settings.seed)
    examples = [make(index=index) for index in range(settings.examples)]
    tokens = np.array([[*start, *(symbols[s] for s in e.text)] for e in examples], np.int32)
    right = np.array([[symbols[value] for value in e.values] for e in examples])
    # As many places for every number of pairs: one compiled program.
    places = np.zeros((len(examples), max(settings.pairs)), np.int32)
    places[:, :pairs] = np.array([e.queries for e in examples]) + len(start)
    candidates = np.array([symbols[value] for value in VALUES], np.int32)
    size = settings.batch_size(length, settings.examples)
    found = [
        choose_tokens(subject.model, tokens[at : at + size], places[at : at + size], candidates)
        for at in range(0, len(tokens), size)
    ]
    likeliest, best = (np.concatenate(parts)[:, :pairs] for parts in zip(*found, strict=True))
    return likeliest == right, best == right
