"""The page and the tables of the long-context evaluation."""

import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from msa_jax.attention.diagnostics import SELECTION_METRICS
from msa_jax.eval import figures, page
from msa_jax.eval.long_context import Cell, ResultsFile, Task
from msa_jax.eval.long_context_figures import (
    Results,
    needle_figures,
    recall_figures,
    ruler_figures,
    selection_figures,
    text_figures,
)
from msa_jax.eval.run_figures import CaptionedFigure

# Which score of a cell stands in the table, and what it is called there.
_HEADLINES: dict[Task, tuple[tuple[str, str], ...]] = {
    "perplexity": (("loss", "loss"), ("bits_per_byte", "bits per byte")),
    "needle": (("exact", "exact"), ("choice", "choice")),
    "ruler": (("recall", "recall"), ("choice", "choice")),
    "mqar": (("accuracy", "accuracy"), ("choice", "choice")),
    "selection": (
        ("score_recall", "score recall"),
        ("block_recall", "block recall"),
        ("coverage", "coverage"),
        ("collapsed", "collapsed"),
        ("overlap_1", "overlap of neighbours"),
        ("stability", "stability"),
    ),
}
_NOTES = (
    "Loss: nats per token, the same text at every length. Exact: the greedy continuation is the "
    "right answer. Recall: share of its parts that the continuation spells. Choice: the right "
    "answer is the likeliest of 16 (chance 0.06), for mqar of 32 values (chance 0.03). Needle and "
    "mqar are means over depths and numbers of pairs, selection over layers. A dash: left out, "
    "because it does not fit the length or the model."
)


def summary_table(
    results: ResultsFile, *, without: Collection[Task] = ()
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of results: a row per score, `without` some tasks, a column per length."""
    tasks = [task for task in _HEADLINES if task not in without]
    cells = [pair for task in tasks for pair in results.of_task(task)]
    lengths = sorted({cell.length for cell, _ in cells})
    rows: dict[str, dict[int, str]] = {}
    for cell, values in cells:
        for score, name in _HEADLINES[cell.task]:
            if score in values:
                title = " ".join(part for part in (cell.task, cell.variant, name) if part)
                value = headline(values[score])
                rows.setdefault(title.replace("_", " "), {})[cell.length] = value
    head = ["", *(figures.short_length(length) for length in lengths)]
    return head, [[title, *(row.get(n, "-") for n in lengths)] for title, row in rows.items()]


def headline(value: Any) -> str:
    """A score, or the mean of a list of them, leaving out what was not measured."""
    values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    return f"{np.mean(values):.3f}" if values else "-"


def describe(cell: Cell, values: Mapping[str, Any]) -> str:
    """A finished cell in one line."""
    scores = [(name, values[score]) for score, name in _HEADLINES[cell.task] if score in values]
    return ", ".join(f"{name} {headline(value)}" for name, value in scores)


def write_page(runs: Results, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `index.html` and the figures as SVG files of their own; returns the page's path.

    Args:
      runs: results by what the page calls the run.
      folder: an existing one.
    """
    found: dict[str, CaptionedFigure] = {}

    def grid(parts: Mapping[str, CaptionedFigure]) -> str:
        found.update(parts)
        return page.grid([page.figure(*part) for part in parts.values()])

    html = render_page(runs, grid)
    folder = pathlib.Path(folder)
    for name, figure in found.items():
        path = folder / f"{name}.svg"
        path.write_text(figures.standalone(figure.svg), encoding="utf-8")
    output = folder / "index.html"
    output.write_text(html, encoding="utf-8")
    return output


def render_page(runs: Results, grid: Callable[[Mapping[str, CaptionedFigure]], str]) -> str:
    """The page as a string; `grid` sets figures."""
    body = []
    for label, results in runs.items():
        title = f"{label}, {results.identity['step']:,} steps"
        body.append(page.section(title, page.table(*summary_table(results, without=("ruler",)))))
    body.append(page.note(_NOTES))
    sections = {
        "Loss": text_figures(runs),
        "Needle in a haystack": _of_each(runs, needle_figures),
        "RULER-style tasks": _of_each(runs, ruler_figures),
        "Associative recall": _of_each(runs, recall_figures),
        "Selection of blocks": _of_each(runs, selection_figures),
    }
    for title, parts in sections.items():
        if parts:
            body.append(page.section(title, grid(parts)))
    for label, results in runs.items():
        facts = [[name, str(value)] for name, value in results.identity.items()]
        parts = [
            page.details("All scores", page.table(*summary_table(results))),
            *_layer_tables(results),
            page.details("Checkpoint and settings", page.table(["", label], facts, style="facts")),
        ]
        body.append(page.section(f"Details of {label}", "".join(parts)))
    return page.document("Long-context evaluation", "".join(body))


def _of_each(
    runs: Results, draw: Callable[[str, ResultsFile], dict[str, CaptionedFigure]]
) -> dict[str, CaptionedFigure]:
    parts = [draw(label, results) for label, results in runs.items()]
    return {name: figure for part in parts for name, figure in part.items()}


def _layer_tables(results: ResultsFile) -> Iterable[str]:
    """Selection metrics of every layer, a table for each text and length."""
    for cell, values in results.of_task("selection"):
        names = [name for name in (*SELECTION_METRICS, "stability") if name in values]
        rows = [
            [str(layer), *(f"{values[name][place]:.3f}" for name in names)]
            for place, layer in enumerate(values["layers"])
        ]
        title = f"Selection of every layer: {cell.variant}, {figures.short_length(cell.length)}"
        head = ["layer", *(name.replace("_", " ") for name in names)]
        yield page.details(title, page.table(head, rows))
