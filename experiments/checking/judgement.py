"""Figures, the bars they must stay below, and the record made of them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]

# Stands before each record that a group prints.
MARK = "check-record "

# Of the main branch: ||o - exact|| / ||exact||, over all sampled rows and of the worst one.
OUTPUT_ERRORS = {"bfloat16": (4e-3, 1e-2), "float16": (5e-4, 2e-3)}
# ||gradient - exact|| / ||exact||.
GRADIENT_ERRORS = {"bfloat16": 1e-2, "float16": 2e-3}
LSE_ERROR = 1e-4
# Of the KL loss: ||kl - exact|| / ||exact||.
KL_ERROR = 2e-3
# Of a selected block's score below the exact choice, relative to the row's largest score.
SCORE_GAP = 1e-4


class CheckError(AssertionError):
    """A result that no figure describes: ids out of order, a value missing."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number and the largest that passes; without a bar it is reported alone."""

    value: float
    bar: float = math.inf

    @property
    def passed(self) -> bool:
        """A NaN does not pass."""
        return self.value <= self.bar


def record(figures: Mapping[str, Figure]) -> Record:
    """The JSON form of a case's figures and their verdict; an infinite bar is None."""
    return {
        "figures": {name: figure.value for name, figure in figures.items()},
        "bars": {
            name: figure.bar if math.isfinite(figure.bar) else None
            for name, figure in figures.items()
        },
        "passed": all(figure.passed for figure in figures.values()),
    }
