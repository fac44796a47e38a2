"""Synthetic retrieval: find what was said once, far back in a long text.

"passkey" hides one needle with a number in filler text; "multi_key" hides several, each with its
own key, and asks for one. The question and the answer stand at the end. An example is a pure
function of its arguments: (seed, split, index) seeds everything random in it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from msa_jax.train.config import RetrievalTask

Split = Literal["train", "validation"]

_WHO = (
    "The gardener",
    "A young baker",
    "My neighbour",
    "The old captain",
    "A travelling painter",
    "The schoolteacher",
    "Her cousin",
    "The clockmaker",
)
_WHAT = (
    "carried a basket of apples",
    "waited for the morning train",
    "mended a wooden chair",
    "told a long story",
    "watched the rain fall",
    "wrote a letter home",
    "looked for a lost glove",
    "hummed a quiet song",
)
_WHERE = (
    "beside the mill",
    "near the harbour",
    "at the edge of the forest",
    "behind the town hall",
    "under the stone bridge",
    "in the empty square",
    "on the way to the market",
    "before the shops opened",
)
FILLER = tuple(f"{who} {what} {where}. " for who in _WHO for what in _WHAT for where in _WHERE)

# Of one length, so that the shortest example's length does not depend on the draw.
KEYS = (
    "amber", "brass", "cedar", "delta", "ember", "flint", "grove", "heron",
    "ivory", "jolly", "lemon", "maple", "north", "olive", "pearl", "quiet",
)  # fmt: skip
_CODES = range(10_000, 100_000)


@dataclasses.dataclass(frozen=True)
class RetrievalExample:
    """One question about a long text.

    Attributes:
      prompt: filler with the needles in it, then the question; ends just before the answer.
      answer: what should follow, with its leading space; it stands once in the prompt.
      depth: where the needle that answers lies, from 0 (start of the text) to 1 (end).
    """

    prompt: str
    answer: str
    depth: float

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
) -> RetrievalExample:
    """Makes example `index` of a stream.

    Args:
      task: "passkey" or "multi_key".
      length: most that prompt and answer measure together; they are at most one filler sentence
        shorter by `len`, and somewhat more by a tokenizer, whose tokens join across sentences.
      seed: of the stream.
      index: which example of the stream, from 0.
      split: "train" and "validation" examples are drawn apart.
      depth: where the needle lies, from 0 (start) to 1 (end); None draws it.
      num_keys: needles of a "multi_key" example, the asked one included.
      measure: the length of a text; characters (here also bytes) unless told otherwise. For tokens
        give a function that counts them.

    Raises:
      ValueError: `length` is below `shortest_length`, or an argument is out of range.
    """
    _check(task, depth, num_keys)
    shortest = shortest_length(task, num_keys=num_keys)
    if length < shortest:
        raise ValueError(f"length={length}: a {task!r} example needs at least {shortest}")
    rng = np.random.default_rng((seed, get_args(Split).index(split), index))
    needle, distractors, question, answer = _draw_needles(task, num_keys, rng)
    drawn_depth = rng.random()  # also when not needed: depths of one example differ in nothing else
    depth = drawn_depth if depth is None else depth
    filler = _draw_filler(
        length - measure(needle + "".join(distractors) + question + answer), rng, measure
    )
    places = rng.random(len(distractors))
    while True:
        context, found = _hide(needle, distractors, places, filler, depth)
        if not filler or measure(context + question + answer) <= length:
            return RetrievalExample(context + question, answer, found)
        filler = filler[:-1]


def shortest_length(task: RetrievalTask, *, num_keys: int = 4) -> int:
    """Characters of an example without filler; no tokenizer that splits bytes makes it more."""
    _check(task, None, num_keys)
    needle, distractors, question, answer = _draw_needles(task, num_keys, np.random.default_rng(0))
    return len(needle + "".join(distractors) + question + answer)


def _check(task: str, depth: float | None, num_keys: int) -> None:
    if task not in get_args(RetrievalTask):
        raise ValueError(f"task={task!r}: choose one of {', '.join(get_args(RetrievalTask))}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must lie between 0 (start) and 1 (end)")
    if not 1 <= num_keys <= len(KEYS):
        raise ValueError(f"num_keys={num_keys}: must lie between 1 and {len(KEYS)}")


def _draw_needles(
    task: str, num_keys: int, rng: np.random.Generator
) -> tuple[str, list[str], str, str]:
    """The needle that answers, the others, the question and the answer."""
    if task == "passkey":
        names = ["pass key"]
    else:
        names = [f"{key} key" for key in rng.choice(KEYS, num_keys, replace=False)]
    codes = _CODES.start + rng.choice(len(_CODES), len(names), replace=False)
    needles = [f"The {name} is {code}. " for name, code in zip(names, codes, strict=True)]
    question = f"\nWhat is the {names[0]}? The {names[0]} is"
    return needles[0], needles[1:], question, f" {codes[0]}"


@functools.lru_cache(maxsize=8)
def _filler_lengths(measure: Callable[[str], int]) -> np.ndarray:
    return np.array([measure(sentence) for sentence in FILLER])


def _draw_filler(budget: int, rng: np.random.Generator, measure: Callable[[str], int]) -> list[str]:
    """Sentences that measure at most `budget` in sum, and would not with one more."""
    lengths = _filler_lengths(measure)
    drawn = rng.integers(len(FILLER), size=max(budget, 0) // lengths.min() + 1)
    count = np.searchsorted(np.cumsum(lengths[drawn]), budget, side="right")
    return [FILLER[sentence] for sentence in drawn[:count]]


def _hide(
    needle: str, distractors: list[str], places: np.ndarray, filler: list[str], depth: float
) -> tuple[str, float]:
    """All needles between the sentences, `needle` nearest to `depth`, and where it came to lie."""
    sentences = list(filler)
    for distractor, place in zip(distractors, places, strict=True):
        sentences.insert(round(place * len(sentences)), distractor)
    starts = np.cumsum([0, *map(len, sentences)])
    cut = int(np.argmin(np.abs(starts - depth * starts[-1])))
    text = "".join([*sentences[:cut], needle, *sentences[cut:]])
    return text, float(starts[cut] / starts[-1]) if sentences else depth
