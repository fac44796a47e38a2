"""What the tasks of `msa_jax.data.retrieval` hide in a text, what they ask, and what is right.

The kinds of task are those of RULER (arXiv 2404.06654): needles with one or several keys, values
and queries, variable tracking, common and frequent words, and questions about inserted facts.
"""

import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from msa_jax.train.config import RetrievalTask

# Words, names and codes are of one length each, so that the shortest example's length does not
# depend on the draw.
KEYS = (
    "amber", "brass", "cedar", "delta", "ember", "flint", "grove", "heron",
    "ivory", "jolly", "lemon", "maple", "north", "olive", "pearl", "quiet",
)  # fmt: skip
_NAMES = (
    "Alice", "Bruno", "Clara", "David", "Emily", "Frank", "Grace", "Henry",
    "Irene", "James", "Karen", "Louis", "Maria", "Nancy", "Oscar", "Peter",
    "Quinn", "Rosie", "Sarah", "Tomas", "Ursel", "Vince", "Wanda", "Xenia",
    "Yusuf", "Zelda", "Aaron", "Bella", "Cyril", "Daisy", "Edgar", "Fiona",
)  # fmt: skip
_TOWNS = (
    "Paris", "Tokyo", "Milan", "Delhi", "Cairo", "Seoul", "Dubai", "Miami",
    "Lagos", "Quito", "Hanoi", "Sofia", "Osaka", "Perth", "Essen", "Genoa",
)  # fmt: skip
_CODES = range(10_000, 100_000)

# Wrong answers that an example comes with, to rank the right one among.
NUM_WRONG = 15
# Most needles of an example: each of two people needs a name of its own, and a town.
MAX_KEYS = len(KEYS)

# Common words: three stand six times each, all others at most twice.
_COMMON, _OTHERS = 6, 2
# Frequent words: the k-th stands as k ** -1.5, so that any text has three that stand apart.
_EXPONENT = 1.5


class Draw(NamedTuple):
    """One question, before it is hidden in a text.

    Attributes:
      needles: sentences that the answer needs, in the order in which they are to stand.
      distractors: sentences of the same kind that may stand anywhere.
      question: what ends the prompt.
      answers: the parts of the right answer, in order.
      others: wrong parts, first those that stand in the text; at least `NUM_WRONG`.
    """

    needles: tuple[str, ...]
    distractors: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...]


class WordDraw(NamedTuple):
    """A question about a list of words, which is the whole text; fields as in `Draw`."""

    words: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    others: tuple[str, ...]


def _passkey(num_keys: int, rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    return _one_of(["pass key"], rng, spare)


def _multi_key(num_keys: int, rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    names = [f"{key} key" for key in rng.choice(KEYS, num_keys, replace=False)]
    return _one_of(names, rng, spare)


def _one_of(names: Sequence[str], rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    """A code for each name; the first is asked."""
    codes = _draw_codes(rng, len(names))
    needles = [_needle(name, code) for name, code in zip(names, codes, strict=True)]
    return Draw(
        needles=(needles[0],),
        distractors=tuple(needles[1:]),
        question=_question(names[0]),
        answers=(codes[0],),
        others=wrong_codes(codes[1:], codes[0], spare),
    )


def wrong_codes(first: Sequence[str], right: str, spare: np.random.Generator) -> tuple[str, ...]:
    """`NUM_WRONG` codes or more, none of them right: `first`, then fresh ones."""
    return _others(first, (right,), _endless_codes(spare))


def _multi_value(num_keys: int, rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    """One key that has several codes; all are asked, in the order of the text."""
    key, codes = rng.choice(KEYS), _draw_codes(rng, num_keys)
    needles = tuple(f"The {key} key is {code}. " for code in codes)
    question = f"\nWhat are all the {key} keys? The {key} keys are"
    return Draw(needles, (), question, codes, _others((), codes, _endless_codes(spare)))


def _multi_query(num_keys: int, rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    """Several keys with a code each; half of them are asked, in an order of the question's own."""
    keys, codes = rng.choice(KEYS, num_keys, replace=False), _draw_codes(rng, num_keys)
    needles = [f"The {key} key is {code}. " for key, code in zip(keys, codes, strict=True)]
    asked = (num_keys + 1) // 2
    order = rng.permutation(asked)
    names = " and ".join(keys[order])
    question = f"\nWhat are the keys {names}? They are"
    answers = tuple(codes[place] for place in order)
    others = _others(codes[asked:], answers, _endless_codes(spare))
    return Draw(tuple(needles[:asked]), tuple(needles[asked:]), question, answers, others)


def _variable_tracking(num_keys: int, rng: np.random.Generator, spare: np.random.Generator) -> Draw:
    """Two chains of assignments, a value each; which variables hold the first one's?"""
    values = _draw_codes(rng, 2)
    names = _others((), (), _endless_variables(rng), count=2 * num_keys)
    chains = names[:num_keys], names[num_keys:]
    sentences = []
    for chain, value in zip(chains, values, strict=True):
        sources = (value, *(f"VAR {name}" for name in chain[:-1]))
        sentences.append(
            iter([f"VAR {n} = {source}. " for n, source in zip(chain, sources, strict=True)])
        )
    # Both chains in order, one mixed into the other.
    turns = rng.permutation(np.repeat([0, 1], num_keys))
    needles = tuple(next(sentences[turn]) for turn in turns)
    question = f"\nWhich variables hold {values[0]}? They are"
    others = _others(chains[1], chains[0], _endless_variables(spare))
    return Draw(needles, (), question, chains[0], others)


def _question_answering(
    num_keys: int, rng: np.random.Generator, spare: np.random.Generator
) -> Draw:
    """Facts about people; half of the questions need two of them."""
    people = rng.choice(_NAMES, 2 * num_keys, replace=False)
    first, second = people[:num_keys], people[num_keys:]
    towns = rng.choice(_TOWNS, num_keys, replace=False).tolist()
    works = [f"{one} works with {other}. " for one, other in zip(first, second, strict=True)]
    lives = [f"{one} lives in {town}. " for one, town in zip(second, towns, strict=True)]
    if rng.integers(2):
        needles, distractors = (works[0], lives[0]), (*works[1:], *lives[1:])
        question = f"\nWhere does the colleague of {first[0]} live? The town is"
    else:
        needles, distractors = (lives[0],), (*works, *lives[1:])
        question = f"\nWhere does {second[0]} live? The town is"
    others = _others(towns[1:], towns[:1], iter(spare.permutation(_TOWNS)))
    return Draw(needles, distractors, question, (towns[0],), others)


# Each takes how many keys there are and two generators: of what stands in the text, and of what
# only the wrong answers say.
NEEDLE_TASKS: dict[
    RetrievalTask, Callable[[int, np.random.Generator, np.random.Generator], Draw]
] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "question_answering": _question_answering,
}


def _common_words(count: int, rng: np.random.Generator, spare: np.random.Generator) -> WordDraw:
    """Three words stand often, all others seldom and equally so."""
    others, rest = divmod(count - 3 * _COMMON, _OTHERS)
    words = _others((), (), _endless_words(rng), count=3 + others + 1)
    common = sorted(words[:3])
    listed = [*common * _COMMON, *words[3 : 3 + others] * _OTHERS, *words[3 + others :] * rest]
    question = "\nThe three most common words, in the order of the alphabet, are"
    wrong = _others(words[3:], common, _endless_words(spare))
    return WordDraw(tuple(rng.permutation(listed)), question, tuple(common), wrong)


def _frequent_words(count: int, rng: np.random.Generator, spare: np.random.Generator) -> WordDraw:
    """How often words stand falls as a power of their rank; which are the first three?"""
    ranks = np.arange(1, count + 1)
    # The sum of k ** -1.5 over all k.
    times = (count / 2.612 * ranks**-_EXPONENT).astype(int)
    times = times[times > 0]
    times = np.append(times, np.ones(count - times.sum(), int))
    words = _others((), (), _endless_words(rng), count=len(times))
    question = "\nThe three most frequent words, from the most frequent on, are"
    wrong = _others(words[3:], words[:3], _endless_words(spare))
    listed = rng.permutation(np.repeat(words, times))
    return WordDraw(tuple(listed), question, words[:3], wrong)


# The fewest words that it works with, and what takes their number and generators as above.
WORD_TASKS: dict[
    RetrievalTask, tuple[int, Callable[[int, np.random.Generator, np.random.Generator], WordDraw]]
] = {
    "common_words": (3 * _COMMON, _common_words),
    "frequent_words": (40, _frequent_words),
}


# Two words too, so that a long text has names enough.
_MANY_NAMES = (
    "pass key",
    *(f"{key} key" for key in KEYS),
    *(f"{one} {other} key" for one in KEYS for other in KEYS if one != other),
)


class Pair(NamedTuple):
    """A needle, and the question that asks for its code."""

    needle: str
    question: str
    code: str


def draw_pairs(count: int, rng: np.random.Generator) -> tuple[Pair, ...]:
    """Different names, a code of its own each.

    Args:
      count: at most `len(_MANY_NAMES)` are drawn.
      rng: of names and codes.
    """
    names = rng.choice(_MANY_NAMES, min(count, len(_MANY_NAMES)), replace=False)
    codes = _draw_codes(rng, len(names))
    return tuple(
        Pair(_needle(name, code), _question(name), code)
        for name, code in zip(names, codes, strict=True)
    )


def _needle(name: str, code: str) -> str:
    return f"The {name} is {code}. "


def _question(name: str) -> str:
    return f"\nWhat is the {name}? The {name} is"


# Characters of the longest needle and its question.
LONGEST_PAIR = max(len(_needle(name, "00000") + _question(name)) for name in _MANY_NAMES)


def _draw_codes(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    return tuple(str(_CODES.start + n) for n in rng.choice(len(_CODES), count, replace=False))


def _endless_codes(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield str(rng.integers(_CODES.start, _CODES.stop))


def _endless_variables(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield "".join(rng.choice(list(string.ascii_uppercase), 5))


def _endless_words(rng: np.random.Generator) -> Iterator[str]:
    """Words of no language, of three consonants and two vowels."""
    consonants, vowels = list("bdfgklmnprstvz"), list("aeiou")
    while True:
        letters = np.empty((64, 5), "U1")
        letters[:, ::2] = rng.choice(consonants, (64, 3))
        letters[:, 1::2] = rng.choice(vowels, (64, 2))
        yield from ("".join(row) for row in letters)


def _others(
    first: Sequence[str], forbidden: Sequence[str], source: Iterator[str], count: int = NUM_WRONG
) -> tuple[str, ...]:
    """`count` different texts, none of them forbidden: `first`, then from `source`."""
    found = dict.fromkeys(str(text) for text in first)
    for text in source:
        if len(found) >= count:
            break
        if text not in forbidden:
            found[str(text)] = None
    return tuple(found)[: max(count, len(first))]
