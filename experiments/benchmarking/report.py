"""The table and the page of a benchmark's results, from its records alone."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from experiments.benchmarking import figures, results, summary, training_report
from experiments.benchmarking.cases import BASELINES, FORWARD, MSA, TRAINING
from experiments.benchmarking.results import Part, Row
from experiments.benchmarking.tables import factors, gigabytes, head, milliseconds, span
from msa_jax.eval.figures import short_length
from msa_jax.eval.tables import Table, markdown

Record = dict[str, Any]


def write(runs: Sequence[Record], stem: pathlib.Path) -> None:
    """Writes `stem` as .json, .md and .svg, with a second plot, `stem`_training.svg, of training.

    Without a time of MSA there is no plot.

    Args:
      runs: of `results.load`.
      stem: path without a suffix.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    summary.save(runs, stem.with_suffix(".json"))
    for passes, rows in _plotted(results.rows(runs)).items():
        what = "forward" if passes == FORWARD else "forward, backward and KL"
        path = stem.parent / f"{_picture(stem.name, passes)}.svg"
        path.write_text(figures.time_and_speedup(rows, what), encoding="utf-8")
    stem.with_suffix(".md").write_text(page(runs, stem.name), encoding="utf-8")


def show(runs: Sequence[Record]) -> None:
    """Prints the tables."""
    console = rich.console.Console()
    console.width = max(console.width, 160)  # a log file has none of its own
    rows = results.rows(runs)
    # The most important table last, where it stays in sight.
    for title, (header, lines) in reversed(_tables(rows).items()):
        table = rich.table.Table(*header, title=title, box=rich.box.SIMPLE, pad_edge=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for failure in results.failures(runs):
        console.print(f"failed: {failure}", style="red", markup=False)


def _plotted(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by passes, of those in which MSA was timed."""
    passes = dict.fromkeys(row.case.passes for row in rows if row.case.subject == MSA)
    return {name: [row for row in rows if row.case.passes == name] for name in passes}


def _picture(name: str, passes: str) -> str:
    return name if passes == FORWARD else f"{name}_{passes}"


def _tables(rows: Sequence[Row]) -> dict[str, Table]:
    trained = [row for row in rows if row.case.passes == TRAINING]
    rows = [row for row in rows if row.case.passes == FORWARD]
    msa = [row for row in rows if row.case.subject == MSA]
    tables = {
        "Time and speed-up": _time_table(msa, rows),
        "Rates and floors": _rate_table(msa),
        "Checks and memory": _check_table(msa),
        "Baselines": _baseline_table([row for row in rows if row.case.subject != MSA]),
        **training_report.tables(trained),
    }
    return {title: table for title, table in tables.items() if table[1]}


def _time_table(msa: Sequence[Row], rows: Sequence[Row]) -> Table:
    header = ["tokens", "selection", "index", "select (ms)", "main (ms)", "both (ms)"]
    header += ["both, fastest to slowest (ms)", "both, share of floor"]
    header += [f"x {title}" for title in BASELINES.values()]
    lines = []
    for row in msa:
        both = row.parts["both"]
        line = [*head(row), *(milliseconds(row.parts[name].median_ms) for name in results.PARTS)]
        line += [span(both), f"{both.share:.0%}"]
        lines.append([*line, *factors(summary.speedups(row, rows))])
    return header, lines


def _rate_table(msa: Sequence[Row]) -> Table:
    header = ["tokens", "selection", "index"]
    for name in ("select", "main"):
        header += [f"{name} TFLOP/s", f"{name} TB/s", f"{name} floor (ms)", f"{name} share"]
    lines = []
    for row in msa:
        line = head(row)
        for name in ("selection", "main"):
            line += _rates(row.parts[name])
        lines.append(line)
    return header, lines


def _check_table(msa: Sequence[Row]) -> Table:
    header = ["tokens", "selection", "index", "union of 4", "union of 8", "recall", "score gap"]
    header += ["output error", "against exact selection", "peak (GB)", "workspace (GB)"]
    lines = []
    for row in msa:
        record, checked = row.record, row.record["checks"]
        line = [*head(row), *(f"{record['union'][n]:.1f}" for n in ("4", "8"))]
        line += [f"{checked['selection_recall']:.4f}", f"{checked['selection_gap']:.1e}"]
        line += [f"{checked['output_error']:.1e}"]
        line += [f"{checked['error_of_selection']:.1e}", gigabytes(record["peak_bytes"])]
        lines.append([*line, gigabytes(record["temporary_bytes"]["both"])])
    return header, lines


def _baseline_table(baselines: Sequence[Row]) -> Table:
    header = ["tokens", "baseline", "time (ms)", "fastest to slowest (ms)", "repeats", "TFLOP/s"]
    header += ["peak (GB)"]
    lines = []
    for row in baselines:
        part = row.parts["both"]
        line = [
            short_length(row.case.length),
            BASELINES[row.case.subject],
            milliseconds(part.median_ms),
        ]
        line += [span(part)]
        line += [str(row.record["timings"]["both"]["repeats"]), f"{part.teraflops:.0f}"]
        lines.append([*line, gigabytes(row.record["peak_bytes"])])
    return header, lines


def page(runs: Sequence[Record], name: str) -> str:
    """The Markdown page; `name` is that of its files, without a suffix."""
    rows = results.rows(runs)
    device = (runs[0]["environment"]["gpu"] or {}).get("name", "an unknown device")
    rates = results.ceilings(runs)
    parts = [f"# Block selection and sparse attention on {device}", _INTRODUCTION]
    parts.append(
        f"Ceilings measured in the same runs: {rates.matmul_flops / 1e12:.0f} TFLOP/s (bf16 "
        f"matmul), {rates.copy_bytes / 1e12:.2f} TB/s (copy, read and written bytes)."
    )
    for passes in _plotted(rows):
        file = _picture(name, passes)
        parts.append(f"![Time and speed-up against length, {passes}]({file}.svg)")
    trained = [row for row in rows if row.case.passes == TRAINING]
    if trained:
        parts.append(training_report.introduction(trained))
    for title, table in _tables(rows).items():
        parts.append(f"## {title}\n\n{markdown(table, names=3)}")
    failed = results.failures(runs)
    if failed:
        lines = "\n".join(f"* {textwrap.shorten(line, 160)}" for line in failed)
        parts.append("## Not measured\n\n" + lines)
    parts.append("## Runs\n\n" + "\n".join(_environment(run["environment"]) for run in runs))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """\
Written by `python -m experiments.benchmark`; the JSON file of the same name holds every number. One
layer's forward pass over one sequence, selection included. Selections: *random* from independent
index queries and keys (neighbouring queries share least), *identical* with one index query per
block of queries (they share everything), *correlated* from made-up index queries drawn so that 4
neighbours select 1.38 K distinct blocks, the overlap reported of the released MiniMax-M3 (22.1 of
16; no trained model is involved), *captured* from a trained model. The layers of the trained
quickstart model (8 of at most 32 blocks of 16 tokens) select 1.3 to 1.6 K over 4 neighbours and 1.5
to 1.9 K over 8, by its run's metrics and by `python -m experiments.capture_inputs`.

Times are medians of device time over repeated chains of calls. The floor is the larger of useful
FLOPs over the matmul ceiling and bytes over the copy ceiling, selection and main branch one after
the other; an 8-bit index counts at twice the bf16 rate. A share of the floor is floor over time. "x
cuDNN" is its time over that of both; with * it is extrapolated by N² from the longest length it was
measured at. Before it is timed, each case's sampled query rows are held to the exact selection
(float32 scores) and to float64 attention, and two runs to each other bit for bit. The output error
is that of the worst row, over the blocks that were selected; "against exact selection" compares all
sampled rows with attention over the exact selection, which is what an 8-bit index costs. Peak is a
process's so far, all inputs included; workspace is what the compiled program takes beside arguments
and results."""


def _environment(environment: Record) -> str:
    packages = ", ".join(f"{name} {v}" for name, v in environment["packages"].items() if v)
    gpu = environment["gpu"] or {}
    flags = "".join(
        f", XLA_FLAGS={value} for {subject}"
        for subject, value in environment.get("xla_flags", {}).items()
    )
    return (
        f"* {environment['date']}, commit {environment['commit']}, {gpu.get('name')}, driver "
        f"{gpu.get('driver_version')}, power limit {gpu.get('power.limit')}, Python "
        f"{environment['python']}, {packages}{flags}: "
        f"`{environment['command']}`. Method: {environment['method']}."
    )


def _rates(part: Part) -> list[str]:
    rates = [f"{part.teraflops:.0f}", f"{part.terabytes:.2f}"]
    return [*rates, milliseconds(part.floor_ms), f"{part.share:.0%}"]
