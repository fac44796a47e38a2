"""The numbers as CSV and JSON, and on the terminal."""

import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import rich.box
import rich.console
import rich.table

from experiments.benchmarking.cases import FORWARD, TRAINING
from experiments.costing.costs import BreakEven, Setting
from msa_jax.eval.tables import Table


def show(title: str, tables: Mapping[str, Table], notes: Sequence[str]) -> None:
    """Prints a title, tables, and notes below them."""
    console = rich.console.Console()
    console.width = max(console.width, 130)  # a log file has none of its own
    console.print(title, style="bold", markup=False, highlight=False)
    for caption, (header, lines) in tables.items():
        table = rich.table.Table(title=caption, box=rich.box.SIMPLE, pad_edge=False)
        for index, cell in enumerate(header):
            table.add_column(cell, justify="right" if index else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for note in notes:
        console.print(f"* {note}", markup=False, highlight=False)


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the names of the first as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(
    rows: Sequence[Mapping[str, object]],
    evens: Mapping[str, Sequence[BreakEven]],
    setting: Setting,
    command: str,
) -> str:
    """Everything: rows, break-even lengths by model, what went in, and the command."""
    found = [
        {"model": n, **dataclasses.asdict(even)} for n, group in evens.items() for even in group
    ]
    values = {"command": command, "settings": _settings(setting), "break_even": found, "rows": rows}
    return json.dumps(values, indent=1) + "\n"


def _settings(setting: Setting) -> dict[str, object]:
    """What went in, as plain values."""
    machine = setting.machine
    return {
        "gpu": machine.gpu.name,
        "measured_on": setting.measured.device_kind,
        "estimated": not setting.own,
        "price_per_gpu_hour": machine.price,
        "peak_flops": machine.gpu.peak_flops,
        "matmul_fraction": machine.matmul_fraction,
        "bytes_per_second": machine.bytes_per_second,
        "batch": setting.batch,
        "selection": setting.measured.selection,
        "dense": setting.measured.dense,
        "forward_lengths": list(setting.measured.lengths[FORWARD]),
        "training_lengths": list(setting.measured.lengths[TRAINING]),
    }


def write(folder: pathlib.Path, files: Mapping[str, str]) -> list[pathlib.Path]:
    """Writes texts by file name; each is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        replacement = folder / f"{name}.tmp"
        replacement.write_text(text, encoding="utf-8")
        os.replace(replacement, folder / name)
    return [folder / name for name in files]
