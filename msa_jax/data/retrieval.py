"""Synthetic retrieval: find what was said once, far back in a long text.

Needles are hidden between sentences of filler or pieces of any text (`Haystack`); the question and
the answer stand at the end. `msa_jax.data.retrieval_tasks` says what is hidden. An example is a
pure function of its arguments: (seed, split, index) seeds everything random in it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from msa_jax.data.associative_recall import VALUES, Split, recall_example, shortest_recall
from msa_jax.data.haystack import Haystack, filler_haystack
from msa_jax.data.retrieval_tasks import (
    LONGEST_PAIR,
    MAX_KEYS,
    NEEDLE_TASKS,
    NUM_WRONG,
    WORD_TASKS,
    draw_pairs,
    wrong_codes,
)
from msa_jax.train.config import RetrievalTask

TASKS: tuple[RetrievalTask, ...] = (
    *NEEDLE_TASKS,
    *WORD_TASKS,
    "associative_recall",
    "many_needles",
)

# Pairs of an associative-recall document: one of these that fits.
_PAIRS = (2, 4, 8, 16, 32)
# Of a many-needles text: how often each needle is asked for, and characters to a needle with its
# questions, which are three quarters of them.
_TIMES = 3
_PAIR_LENGTH = 280


@dataclasses.dataclass(frozen=True)
class RetrievalExample:
    """One question about a long text.

    Attributes:
      prompt: the text with the needles in it, then the question; ends just before the answer.
      answer: what should follow, with its leading space.
      depth: where the first needle that the answer needs lies, from 0 (start of the text) to 1
        (end); None where it lies nowhere in particular.
      parts: what the answer lists, one text or several.
      wrong: other answers of the same form, most of them of the same length, such as the
        distractors'.
    """

    prompt: str
    answer: str
    depth: float | None
    parts: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def document(self) -> str:
        """The prompt and its answer, as a text to train on."""
        return self.prompt + self.answer


def retrieval_example(
    task: RetrievalTask,
    *,
    length: int,
    seed: int,
    index: int,
    split: Split = "validation",
    depth: float | None = None,
    num_keys: int = 4,
    measure: Callable[[str], int] = len,
    haystack: Haystack | None = None,
) -> RetrievalExample:
    """Makes example `index` of a stream.

    Args:
      task: "passkey": one needle; "multi_key": several keys, one asked; "multi_value": all values
        of one key; "multi_query": several keys, half of them asked; "variable_tracking": the
        variables of a chain of assignments; "question_answering": facts about people, of which one
        or two are needed; "common_words", "frequent_words": of a list of words;
        "associative_recall": the value of a key (`msa_jax.data.associative_recall`);
        "many_needles": needles with a name each, and the questions about them, all along the text,
        so that a document asks often and at many distances; "mixture": any of these, drawn
        uniformly.
      length: most that prompt and answer measure together; they are at most one piece of the
        haystack (or word) shorter by `len`, and somewhat more by a tokenizer, whose tokens join
        across pieces.
      seed: of the stream.
      index: which example of the stream, from 0.
      split: "train" and "validation" examples are drawn apart.
      depth: where the first needle lies, from 0 (start) to 1 (end); None draws it. Further ones
        lie behind it.
      num_keys: of a task with several keys, values or variables.
      measure: the length of a text; characters (here also bytes) unless told otherwise. For tokens
        give a function that counts them.
      haystack: what needles are hidden in, by the same measure; sentences of filler by default.

    Raises:
      ValueError: `length` is below `shortest_length`, or an argument is out of range.
    """
    _check(task, depth, num_keys)
    shortest = shortest_length(task, num_keys=num_keys)
    if length < shortest:
        raise ValueError(f"length={length}: a {task!r} example needs at least {shortest}")
    place = _place(seed, split, index)
    task = task_of(task, seed=seed, index=index, split=split)
    if task == "associative_recall":
        return _recall(length, seed, index, split)
    if task in WORD_TASKS:
        return _list_words(task, length, place, measure)
    haystack = haystack or filler_haystack(measure)
    if task == "many_needles":
        return _ask_often(length, depth, place, measure, haystack)
    return _hide_needles(task, length, depth, num_keys, place, measure, haystack)


def task_of(task: RetrievalTask, *, seed: int, index: int, split: Split) -> RetrievalTask:
    """What example `index` of a stream asks: `task`, or which one of a mixture."""
    if task != "mixture":
        return task
    return np.random.default_rng((*_place(seed, split, index), 2)).choice(TASKS).item()


def shortest_length(task: RetrievalTask, *, num_keys: int = 4) -> int:
    """Characters of an example without filler; no tokenizer that splits bytes makes it more."""
    _check(task, None, num_keys)
    if task == "mixture":
        return max(shortest_length(task, num_keys=num_keys) for task in TASKS)
    if task == "associative_recall":
        return shortest_recall(_PAIRS[0])
    if task == "many_needles":
        return LONGEST_PAIR + len(_answer(("00000",)))
    return _shortest(task, num_keys)


@functools.cache
def _shortest(task: RetrievalTask, num_keys: int) -> int:
    lengths = []
    for seed in range(16):  # a task may ask in several ways
        rng, spare = np.random.default_rng(seed), np.random.default_rng(seed)
        if task in WORD_TASKS:
            count, draw = WORD_TASKS[task]
            words = draw(count, rng, spare)
            context, question, answers = " ".join(words.words), words.question, words.answers
        else:
            needles = NEEDLE_TASKS[task](num_keys, rng, spare)
            context = "".join((*needles.needles, *needles.distractors))
            question, answers = needles.question, needles.answers
        lengths.append(len(context + question + _answer(answers)))
    return max(lengths)


def _check(task: str, depth: float | None, num_keys: int) -> None:
    if task not in get_args(RetrievalTask):
        raise ValueError(f"task={task!r}: choose one of {', '.join(get_args(RetrievalTask))}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must lie between 0 (start) and 1 (end)")
    if not 1 <= num_keys <= MAX_KEYS:
        raise ValueError(f"num_keys={num_keys}: must lie between 1 and {MAX_KEYS}")


def _place(seed: int, split: Split, index: int) -> tuple[int, ...]:
    return seed, get_args(Split).index(split), index


def _generators(place: tuple[int, ...]) -> tuple[np.random.Generator, np.random.Generator]:
    """One for what stands in the text, and one for the wrong answers, which changes no text."""
    return np.random.default_rng(place), np.random.default_rng((*place, 1))


def _hide_needles(task, length, depth, num_keys, place, measure, haystack) -> RetrievalExample:
    rng, spare = _generators(place)
    draw = NEEDLE_TASKS[task](num_keys, rng, spare)
    answer = _answer(draw.answers)
    drawn_depth = rng.random()  # also when not needed: depths of one example differ in nothing else
    depth = drawn_depth if depth is None else depth
    sentences = "".join((*draw.needles, *draw.distractors))
    filler = haystack.draw(length - measure(sentences + draw.question + answer), rng)
    # Text that spells an answer by chance would make the question another one.
    filler = [piece for piece in filler if not any(part in piece for part in draw.answers)]
    places = rng.random(len(draw.distractors))
    behind = np.sort(rng.random(len(draw.needles) - 1))
    depths = np.array([depth, *(depth + (1 - depth) * behind)])
    while True:
        context, found = _hide(draw.needles, draw.distractors, places, filler, depths)
        if not filler or measure(context + draw.question + answer) <= length:
            wrong = _wrong(draw.others, draw.answers, spare)
            return RetrievalExample(context + draw.question, answer, found, draw.answers, wrong)
        filler = filler[:-1]


def _hide(
    needles: Sequence[str],
    distractors: Sequence[str],
    places: np.ndarray,
    filler: list[str],
    depths: np.ndarray,
) -> tuple[str, float]:
    """Distractors anywhere, `needles` nearest to `depths`; the text, and where the first lies."""
    sentences = list(filler)
    for distractor, place in zip(distractors, places, strict=True):
        sentences.insert(round(place * len(sentences)), distractor)
    starts = np.cumsum([0, *map(len, sentences)])
    cuts = [int(np.argmin(np.abs(starts - depth * starts[-1]))) for depth in depths]
    pieces, before = [], 0
    for needle, cut in zip(needles, cuts, strict=True):
        pieces += [*sentences[before:cut], needle]
        before = cut
    text = "".join([*pieces, *sentences[before:]])
    return text, float(starts[cuts[0]] / starts[-1] if sentences else depths[0])


def _ask_often(length, depth, place, measure, haystack) -> RetrievalExample:
    """Needles anywhere, each asked for several times further on; the first one's last ends it."""
    rng, spare = _generators(place)
    pairs = draw_pairs(max(1, length // _PAIR_LENGTH), rng)
    times = _TIMES if length >= _PAIR_LENGTH else 1
    starts = rng.random(len(pairs))
    starts[0] = starts[0] if depth is None else depth
    nearest, questions = 1 / (2 * times * len(pairs)), [starts]
    for _ in range(times):  # distances of all octaves alike, each from the mention before
        room = np.maximum(1 - questions[-1], nearest)
        questions.append(questions[-1] + nearest * (room / nearest) ** rng.random(len(pairs)))
    question, answer = pairs[0].question, _answer((pairs[0].code,))
    said = [pair.needle for pair in pairs]
    asked = [f"{pair.question}{_answer((pair.code,))}\n" for pair in pairs] * times
    del asked[len(pairs) * (times - 1)]
    places = np.delete(np.concatenate(questions), len(pairs) * times)
    filler = haystack.draw(length - measure("".join((*said, *asked, question, answer))), rng)
    filler = [piece for piece in filler if not any(pair.code in piece for pair in pairs)]
    while True:
        texts = (*said, *asked, *filler)
        order = np.argsort([*places, *np.linspace(0, 1, len(filler))], kind="stable")
        context = "".join(texts[index] for index in order)
        if not filler or measure(context + question + answer) <= length:
            break
        filler = filler[:-1]
    others = wrong_codes([pair.code for pair in pairs[1:]], pairs[0].code, spare)[:NUM_WRONG]
    found = context.index(pairs[0].needle) / len(context)
    wrong = tuple(_answer((other,)) for other in others)
    return RetrievalExample(context + question, answer, found, (pairs[0].code,), wrong)


def _list_words(task, length, place, measure) -> RetrievalExample:
    """As many words as `length` holds."""
    fewest, draw = WORD_TASKS[task]

    def make(count: int) -> RetrievalExample:
        rng, spare = _generators(place)
        words = draw(count, rng, spare)
        prompt = " ".join(words.words) + words.question
        wrong = _wrong(words.others, words.answers, spare)
        return RetrievalExample(prompt, _answer(words.answers), None, words.answers, wrong)

    short, long = (measure(make(count).document) for count in (fewest, 2 * fewest))
    count = fewest + max(length - short, 0) * fewest // (long - short)
    while True:
        example = make(count)
        excess = measure(example.document) - length
        if excess <= 0 or count == fewest:
            return example
        count = max(fewest, count - max(1, excess * fewest // (long - short)))


def _recall(length: int, seed: int, index: int, split: Split) -> RetrievalExample:
    """An associative-recall text, whose last query is the question."""
    fitting = [count for count in _PAIRS if shortest_recall(count) <= length]
    rng = np.random.default_rng((*_place(seed, split, index), 1))
    num_pairs = int(rng.choice(fitting))
    text = recall_example(
        num_pairs=num_pairs, length=length, seed=seed, index=index, split=split
    ).text
    wrong = rng.permutation([value for value in VALUES if value != text[-1]])[:NUM_WRONG]
    return RetrievalExample(text[:-1], text[-1], None, (text[-1],), tuple(wrong.tolist()))


def _answer(parts: Sequence[str]) -> str:
    return f" {', '.join(parts)}"


def _wrong(
    others: Sequence[str], parts: Sequence[str], spare: np.random.Generator
) -> tuple[str, ...]:
    """Answers with as many parts as the right one, all of them wrong."""
    if len(parts) == 1:
        return tuple(_answer((text,)) for text in others[:NUM_WRONG])
    found: dict[str, None] = {}
    while len(found) < NUM_WRONG:
        found[_answer(spare.choice(others, len(parts), replace=False).tolist())] = None
    return tuple(found)
