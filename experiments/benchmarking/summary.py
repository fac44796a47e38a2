"""Speed-ups over the baselines, and all that the table shows as plain values."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from experiments.benchmarking.cases import BASELINES, DENSE, MSA
from experiments.benchmarking.results import Record, Row, rows


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Times faster than a baseline, and the length its time is extrapolated from (0: measured)."""

    factor: float
    extrapolated_from: int = 0


def save(runs: Sequence[Record], path: pathlib.Path) -> None:
    """Writes runs as one JSON file, with the figures that the table shows computed in."""
    text = json.dumps({"runs": list(runs), "summary": summary(runs)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def speedups(row: Row, all_rows: Sequence[Row]) -> dict[str, Speedup]:
    """How many times faster than each baseline, at the same length and in the same passes.

    A dense baseline that was not timed there is extrapolated by N^2 from the longest length it was
    timed at; flash-msa is not of one power and is left out.
    """
    found = {}
    for name in BASELINES:
        timed = {
            other.case.length: other.whole
            for other in all_rows
            if (other.case.subject, other.case.passes) == (name, row.case.passes)
        }
        length = row.case.length
        if length in timed:
            found[name] = Speedup(timed[length].median_ms / row.whole.median_ms)
        elif name in DENSE and timed and max(timed) < length:
            known = max(timed)
            longer = timed[known].median_ms * (length / known) ** 2
            found[name] = Speedup(longer / row.whole.median_ms, known)
    return found


def summary(runs: Sequence[Record]) -> list[Record]:
    """What the table shows, as plain values."""
    every = rows(runs)
    return [
        {
            "subject": row.case.subject,
            "length": row.case.length,
            "passes": row.case.passes,
            "selection": row.selection,
            "precision": row.precision,
            "parts": {
                name: {
                    "median_ms": part.median_ms,
                    "floor_ms": part.floor_ms,
                    "share_of_floor": part.share,
                    "teraflops": part.teraflops,
                    "terabytes_per_second": part.terabytes,
                }
                for name, part in row.parts.items()
            },
            "speedup": {
                name: {
                    "factor": speedup.factor,
                    "note": f"extrapolated N^2 from {speedup.extrapolated_from}"
                    if speedup.extrapolated_from
                    else "measured",
                }
                for name, speedup in speedups(row, every).items()
                if row.case.subject == MSA
            },
        }
        for row in every
    ]
