"""Runs the long-context evaluation of a checkpoint, cell after cell; finished ones are kept."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from msa_jax.data.retrieval_tasks import NEEDLE_TASKS, WORD_TASKS
from msa_jax.eval import retrieval_scores, text_scores
from msa_jax.eval.long_context import Cell, LongContextConfig, ResultsFile
from msa_jax.eval.subject import CannotMeasure, Subject
from msa_jax.eval.texts import VALIDATION

# What a cell depends on; tasks, lengths and texts only say which cells there are.
_SETTINGS = ("tokens", "examples", "depths", "pairs", "haystack", "seed")


def plan(settings: LongContextConfig) -> list[Cell]:
    """All cells in the order in which they are measured, by length."""
    texts = (VALIDATION, *settings.texts)
    variants = {
        "perplexity": texts,
        "needle": ("passkey",),
        "ruler": (*NEEDLE_TASKS, *WORD_TASKS),
        "mqar": ("",),
        "selection": texts,
    }
    return [
        Cell(task, variant, length)
        for length in sorted(settings.lengths)
        for task in settings.tasks
        for variant in variants[task]
    ]


def measure(subject: Subject, cell: Cell) -> dict[str, Any]:
    """The results of one cell, as JSON can hold them.

    Raises:
      CannotMeasure: it makes no sense for this model, text or length.
      ConfigError: the text is missing or cannot be read.
    """
    if cell.task == "mqar":
        return retrieval_scores.associative_recall(subject, cell.length)
    measures: dict[str, Callable[[Subject, Any, int], dict[str, Any]]] = {
        "perplexity": text_scores.perplexity,
        "needle": retrieval_scores.needle,
        "ruler": retrieval_scores.ruler,
        "selection": text_scores.selection_quality,
    }
    return measures[cell.task](subject, cell.variant, cell.length)


def open_results(subject: Subject, path: str | os.PathLike[str]) -> ResultsFile:
    """The results file of a checkpoint, with what earlier calls have finished.

    Raises:
      ConfigError: the file is damaged, or of another checkpoint or other settings.
    """
    config = json.dumps(dataclasses.asdict(subject.run), sort_keys=True)
    digest = hashlib.blake2b(config.encode(), digest_size=8).hexdigest()
    settings = {name: getattr(subject.settings, name) for name in _SETTINGS}
    identity = {"run": digest, "step": subject.step, "kind": subject.run.attention.kind}
    return ResultsFile.open(path, identity | settings)


def evaluate(
    subject: Subject,
    results: ResultsFile,
    *,
    on_cell: Callable[[Cell, Mapping[str, Any] | str], None],
) -> None:
    """Measures every cell that `results` lacks, each written when it is done.

    Args:
      subject: what is evaluated.
      results: from `open_results`.
      on_cell: is told of each new cell: its results, or why it is left out.

    Raises:
      ConfigError: as `measure`.
    """
    for cell in plan(subject.settings):
        if cell.key in results.cells:
            continue
        try:
            values = measure(subject, cell)
        except CannotMeasure as reason:
            on_cell(cell, str(reason))
            continue
        results.add(cell, values)
        on_cell(cell, values)
