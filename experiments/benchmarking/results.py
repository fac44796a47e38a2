"""From records to a table: work, floors and speed-ups. Pure; needs no GPU.

The floor of a part is the larger of its useful FLOPs over the matmul rate and its bytes over the
copy bandwidth, both measured in the same run; an 8-bit product runs at twice the bf16 rate on
NVIDIA's tensor cores. Useful work is what the definition needs: every causal pair scored once,
every visible token of a selected block attended once, every array read or written once.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.benchmarking.cases import BASELINES, CEILINGS, DENSE, MSA, Case
from msa_jax.cost import attention_flops, causal_pairs

Record = dict[str, Any]

PARTS = ("selection", "main", "both")
_FIELDS_BYTES = 2, 4  # bf16, and int32 or float32


class ResultError(ValueError):
    """A file of results that cannot be reported."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at the least."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device: FLOP/s of a large bf16 matmul, bytes/s of a large copy."""

    matmul_flops: float
    copy_bytes: float

    def floor_ms(self, work: Work, *, eight_bit: bool = False) -> float:
        """The shortest time for this work, in milliseconds."""
        rate = self.matmul_flops * (2 if eight_bit else 1)
        return 1e3 * max(work.flops / rate, work.bytes / self.copy_bytes)


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
      parts: by name; baselines have "both", flash-msa also "selection".
      record: what the process wrote.
    """

    case: Case
    selection: str
    precision: str
    parts: dict[str, Part]
    record: Record


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Times faster than a baseline, and the length its time is extrapolated from (0: measured)."""

    factor: float
    extrapolated_from: int = 0


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


def save(runs: Sequence[Record], path: pathlib.Path) -> None:
    """Writes runs as one JSON file, with the figures that the table shows computed in."""
    text = json.dumps({"runs": list(runs), "summary": summary(runs)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


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
        latest[case.length, case.subject, selection, precision] = Row(
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


def speedups(row: Row, all_rows: Sequence[Row]) -> dict[str, Speedup]:
    """How many times faster than each baseline, at the same length.

    A dense baseline that was not timed there is extrapolated by N^2 from the longest length it was
    timed at; flash-msa is not of one power and is left out.
    """
    found = {}
    for name in BASELINES:
        timed = {r.case.length: r.parts["both"] for r in all_rows if r.case.subject == name}
        length = row.case.length
        if length in timed:
            found[name] = Speedup(timed[length].median_ms / row.parts["both"].median_ms)
        elif name in DENSE and timed and max(timed) < length:
            known = max(timed)
            longer = timed[known].median_ms * (length / known) ** 2
            found[name] = Speedup(longer / row.parts["both"].median_ms, known)
    return found


def summary(runs: Sequence[Record]) -> list[Record]:
    """What the table shows, as plain values."""
    every = rows(runs)
    return [
        {
            "subject": row.case.subject,
            "length": row.case.length,
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


def work(case: Case, part: str) -> Work:
    """What a part of a case must compute and move; "both" of a dense baseline is all of it."""
    half, word = _FIELDS_BYTES
    tokens = case.batch * case.length
    queries = tokens * case.num_heads * case.head_dim * half
    keys = tokens * case.num_kv_heads * case.head_dim * half
    if case.subject in DENSE:
        pairs = case.batch * causal_pairs(case.length)
        return Work(4 * case.num_heads * case.head_dim * pairs, 2 * (queries + keys))
    flops = attention_flops(case.attention, case.length)
    ids = tokens * case.num_kv_heads * case.top_k * word
    selection = Work(
        case.batch * flops.index, tokens * (case.num_kv_heads + 1) * case.index_dim * half + ids
    )
    main = Work(
        case.batch * flops.main, 2 * (queries + keys) + tokens * case.num_heads * word + ids
    )
    return {"selection": selection, "main": main, "both": selection + main}[part]


def _part(case: Case, name: str, timing: Record, precision: str, rates: Ceilings) -> Part:
    eight_bit = precision == "int8"
    if name == "both" and case.subject not in DENSE:  # one after the other
        floor = rates.floor_ms(work(case, "selection"), eight_bit=eight_bit)
        floor += rates.floor_ms(work(case, "main"))
    else:
        floor = rates.floor_ms(work(case, name), eight_bit=eight_bit and name == "selection")
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
