"""What needles are hidden in: sentences of filler, or pieces of any text."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

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


class Haystack:
    """What needles are hidden in: pieces of text and how long each is.

    Args:
      pieces: texts of which none is empty.
      measure: the length of a text, see `retrieval_example`.
      in_order: read on from a random piece, and from the first after the last, instead of drawing
        every piece anew.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        measure: Callable[[str], int] = len,
        *,
        in_order: bool = False,
    ):
        self.pieces = tuple(pieces)
        self.in_order = in_order
        self._lengths = np.array([measure(piece) for piece in self.pieces])

    def draw(self, budget: int, rng: np.random.Generator) -> list[str]:
        """Pieces that measure at most `budget` in sum, and would not with one more."""
        budget = max(budget, 0)
        if self.in_order:
            rounds = budget // self._lengths.sum() + 2
            drawn = np.tile(np.arange(len(self.pieces)), rounds)
            drawn = np.roll(drawn, -rng.integers(len(self.pieces)))
        else:
            drawn = rng.integers(len(self.pieces), size=budget // self._lengths.min() + 1)
        count = np.searchsorted(np.cumsum(self._lengths[drawn]), budget, side="right")
        return [self.pieces[piece] for piece in drawn[:count]]


@functools.lru_cache(maxsize=8)
def filler_haystack(measure: Callable[[str], int] = len) -> Haystack:
    """Sentences of `FILLER`, drawn at random."""
    return Haystack(FILLER, measure)
