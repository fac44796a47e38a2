"""One group of cases in a process of its own: `python -m experiments.checking.worker '<JSON>'`.

Prints one line of JSON behind `MARK` for each case as it comes, so that a hang loses the rest of
its group alone.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from experiments.benchmarking.jax_worker import describe
from experiments.checking import alignment, attention, gradients, poison, precision, selection
from experiments.checking.cases import (
    AlignmentCase,
    AttentionCase,
    Check,
    GradientCase,
    SelectionCase,
    label,
)
from experiments.checking.groups import groups
from experiments.checking.judgement import MARK, Figure, Record, record


def figures_of(case: Check, implementation: str) -> dict[str, Figure]:
    """The figures of a case of any kind."""
    if isinstance(case, AttentionCase):
        return attention.check(case, implementation)
    if isinstance(case, GradientCase):
        return gradients.check(case, implementation)
    if isinstance(case, AlignmentCase):
        return alignment.check(case, implementation)
    if isinstance(case, SelectionCase):
        return selection.check(case, implementation)
    return precision.check(case, implementation)


def run(cases: Iterable[Check], implementation: str) -> Iterator[Record]:
    """A record per case: figures and verdict, or the error it ended with."""
    for case in cases:
        figures = functools.partial(figures_of, case, implementation)
        yield _timed(label(case), case.shape.seed, figures)


def _timed(name: str, seed: int, figures: Callable[[], dict[str, Figure]]) -> Record:
    start = time.monotonic()
    try:
        found = record(figures())
    except Exception as error:  # whatever the libraries raise is this case's failure
        found = {"error": describe(error), "passed": False}
    return {"case": name, "seed": seed, "seconds": time.monotonic() - start} | found


def _poison_missing() -> dict[str, Figure]:
    """Unless a kernel that writes nothing returns NaN, what is unwritten would not show."""
    return {"poison_missing": Figure(1 - poison.share_left((2**20,)), 0.01)}


def main(argv: Sequence[str]) -> int:
    """Runs the group that the only argument names.

    It is JSON: {"group": ..., "quick": ..., "million": ..., "implementation": ...}.
    """
    order = json.loads(argv[1])
    device = jax.devices()[0]
    name, implementation = order.pop("group"), order["implementation"]
    cases = groups(**order)[name]
    shown = {"device": device.device_kind, "jax": jax.__version__}
    probe = _timed("a kernel that writes nothing", 0, _poison_missing)
    for line in itertools.chain([probe], run(cases, implementation)):
        print(MARK + json.dumps(shown | line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
