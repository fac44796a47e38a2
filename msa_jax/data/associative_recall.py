"""Multi-query associative recall (MQAR, arXiv 2312.04927): pairs first, their keys again later.

A text is a line of symbols of one character each: every key with its value, then, among noise,
every key once more, followed by its value. A model recalls if it predicts the value behind a key
that comes the second time. All symbols are printable ASCII, so that each is one token of the byte
vocabulary and the texts can be trained on.
"""

import dataclasses
import string
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "validation"]

# Chance is one in 32. No symbol is of two kinds, so what is asked is never in doubt.
KEYS = string.ascii_letters
VALUES = string.digits + "!#$%&()*+,-/:;<=>?@[]^"
NOISE = " .{}|~_"


@dataclasses.dataclass(frozen=True)
class RecallExample:
    """One text and where it asks.

    Attributes:
      text: the symbols; ends with the value of the last query.
      queries: places in `text` of the keys that come the second time, ascending; what follows each
        is its value.
    """

    text: str
    queries: tuple[int, ...]

    @property
    def values(self) -> tuple[str, ...]:
        """The right answer to each query."""
        return tuple(self.text[place + 1] for place in self.queries)


def shortest_recall(num_pairs: int) -> int:
    """Symbols of a text without noise: every pair twice."""
    return 4 * num_pairs


def recall_example(
    *, num_pairs: int, length: int, seed: int, index: int, split: Split = "validation"
) -> RecallExample:
    """Makes example `index` of a stream, a pure function of its arguments.

    Args:
      num_pairs: keys, each asked once; at most 52.
      length: symbols of the text.
      seed: of the stream.
      index: which example of the stream, from 0.
      split: "train" and "validation" examples are drawn apart.

    Raises:
      ValueError: an argument is out of range.
    """
    if not 1 <= num_pairs <= len(KEYS):
        raise ValueError(f"num_pairs={num_pairs}: must lie between 1 and {len(KEYS)}")
    if length < shortest_recall(num_pairs):
        raise ValueError(
            f"length={length}: {num_pairs} pairs need at least {shortest_recall(num_pairs)}"
        )
    rng = np.random.default_rng((seed, get_args(Split).index(split), index))
    keys = rng.choice(list(KEYS), num_pairs, replace=False)
    values = rng.choice(list(VALUES), num_pairs)
    pairs = [f"{key}{value}" for key, value in zip(keys, values, strict=True)]
    # Behind the pairs: slots of two symbols, one in a row's end for what an odd length leaves.
    slots = (length - 2 * num_pairs) // 2
    chosen = np.append(rng.choice(slots - 1, num_pairs - 1, replace=False), slots - 1)
    symbols = rng.choice(list(NOISE), length - 2 * num_pairs)
    odd = len(symbols) - 2 * slots
    for pair, slot in zip(rng.permutation(pairs), chosen, strict=True):
        symbols[odd + 2 * slot : odd + 2 * slot + 2] = list(pair)
    queries = sorted(int(2 * num_pairs + odd + 2 * slot) for slot in chosen)
    return RecallExample("".join(pairs) + "".join(symbols), tuple(queries))
