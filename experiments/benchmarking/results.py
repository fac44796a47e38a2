"""From records to rows: what was measured, and what failed. Pure; needs no GPU."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.benchmarking.cases import CEILINGS, DENSE, TRAINING, Case
from experiments.benchmarking.work import Ceilings, Work, work

Record = dict[str, Any]

PARTS = ("selection", "main", "both")
TRAINING_PARTS = ("selection", "main", "backward", "kl", "training")
# Parts that are others one after the other, and so are their floors.
_SUMS = {"both": ("selection", "main"), "training": ("selection", "main", "backward", "kl")}


class ResultError(ValueError):
    """A file of results that cannot be reported."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One measured part: time (median, fastest, slowest), rates, and its floor."""

    median_ms: float
    min_ms: float
    max_ms: float
    floor_ms: float
    work: Work

    @property
    def teraflops(self) -> float:
        """Useful TFLOP/s."""
        return self.work.flops / self.median_ms / 1e9

    @property
    def terabytes(self) -> float:
        """TB/s of the bytes that must move."""
        return self.work.bytes / self.median_ms / 1e9

    @property
    def share(self) -> float:
        """Of the floor: 1 is as fast as the device's ceilings allow."""
        return self.floor_ms / self.median_ms


@dataclasses.dataclass(frozen=True)
class Row:
    """One subject at one length.

    Attributes:
      case: what was timed.
      selection: kind of selection, "" for baselines.
      precision: of the index, "" for baselines.
      parts: by name; baselines have "both" or "training", flash-msa's forward also "selection".
      record: what the process wrote.
    """

    case: Case
    selection: str
    precision: str
    parts: dict[str, Part]
    record: Record

    @property
    def whole(self) -> Part:
        """All that the case does."""
        return self.parts["training" if self.case.passes == TRAINING else "both"]


def load(paths: Sequence[pathlib.Path]) -> list[Record]:
    """The runs of result files: each an environment and its records.

    Args:
      paths: JSON of `save`, or JSON lines as a run writes them.

    Raises:
      ResultError: a file is missing or is none of both.
    """
    runs: list[Record] = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            runs += _lines(text) if path.suffix == ".jsonl" else json.loads(text)["runs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path}: not a result of experiments.benchmark: {error}") from error
    return runs


def ceilings(runs: Iterable[Record]) -> Ceilings:
    """The highest rates that the runs measured.

    Raises:
      ResultError: none measured them.
    """
    found = [r for r in _records(runs) if r["case"]["subject"] == CEILINGS and "error" not in r]
    if not found:
        raise ResultError("no record of the ceilings: run the benchmark with its first case")
    return Ceilings(*(max(r[name] for r in found) for name in ("matmul_flops", "copy_bytes")))


def rows(runs: Sequence[Record]) -> list[Row]:
    """All timed records, by length; of equals the last one, since a later run replaces a case."""
    rates = ceilings(runs)
    latest: dict[tuple, Row] = {}
    for record in _records(runs):
        if "timings" not in record:
            continue
        case = Case.from_json(record["case"])
        selection, precision = record.get("selection", ""), record.get("precision", "")
        parts = {
            name: _part(case, name, timing, precision, rates)
            for name, timing in record["timings"].items()
        }
        latest[case.length, case.subject, case.passes, selection, precision] = Row(
            case, selection, precision, parts, record
        )
    return sorted(latest.values(), key=lambda row: row.case.length)


def failures(runs: Sequence[Record]) -> list[str]:
    """A line per case that failed and was not made good by a later run."""
    done = {(row.case.label, row.selection, row.precision) for row in rows(runs)}
    lines = {}
    for record in _records(runs):
        case = Case.from_json(record["case"])
        key = (case.label, record.get("selection", ""), record.get("precision", ""))
        # A process that ended early leaves one error for all that it had not come to.
        wanted = {key} if key[1] else _wanted(case)
        if "error" in record and wanted - done:
            lines[key] = f"{' '.join(part for part in key if part)}: {record['error']}"
    return list(lines.values())


def _wanted(case: Case) -> set[tuple[str, str, str]]:
    """The rows that a case is to yield: label, selection, precision."""
    kinds = itertools.product(case.selections or ("",), case.precisions or ("",))
    return {(case.label, *kind) for kind in kinds}


def _part(case: Case, name: str, timing: Record, precision: str, rates: Ceilings) -> Part:
    eight_bit = precision == "int8"
    floor = 0.0
    for part in (name,) if case.subject in DENSE else _SUMS.get(name, (name,)):
        floor += rates.floor_ms(work(case, part), eight_bit=eight_bit and part == "selection")
    times = (timing["median_ms"], timing["min_ms"], timing["max_ms"])
    return Part(*times, floor, work(case, name))


def _records(runs: Iterable[Record]) -> Iterable[Record]:
    return (record for run in runs for record in run["records"])


def _lines(text: str) -> list[Record]:
    runs: list[Record] = []
    for line in map(json.loads, filter(None, text.splitlines())):
        if "environment" in line:
            runs.append({"environment": line["environment"], "records": []})
        else:
            runs[-1]["records"].append(line)
    return runs
