"""Figures, the bars they must stay below, and the record made of them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]


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
