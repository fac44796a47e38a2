"""Finished runs of several models, each with several seeds, and what is compared of them.

Runs whose configs differ in seeds alone are one *contender*. All is read from the runs' own files
and from the results of the long-context evaluation (`ResultsFile`).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msa_jax import cost
from msa_jax.config import ConfigError
from msa_jax.eval.long_context import ResultsFile, Task
from msa_jax.eval.run_numbers import attention_flops_per_token, clock_median
from msa_jax.eval.runs import Run, read_run
from msa_jax.eval.texts import VALIDATION

_SEEDS = (("train", "seed"), ("data", "seed"))


class LengthScore(NamedTuple):
    """A score that the long-context evaluation has for each length.

    Attributes:
      task: of the evaluation.
      value: its name in a cell.
      variant: the only one that counts; None takes the mean over all.
      title: what it is called.
    """

    task: Task
    value: str
    variant: str | None
    title: str


LENGTH_SCORES = {
    "needle": LengthScore("needle", "exact", None, "needle, exact"),
    "needle_choice": LengthScore("needle", "choice", None, "needle, choice"),
    "ruler": LengthScore("ruler", "recall", None, "RULER-style tasks, recall"),
    "ruler_choice": LengthScore("ruler", "choice", None, "RULER-style tasks, choice"),
    "recall": LengthScore("mqar", "accuracy", None, "associative recall, accuracy"),
    "loss": LengthScore("perplexity", "loss", VALIDATION, "loss (nats per token)"),
    "score_recall": LengthScore("selection", "score_recall", VALIDATION, "score recall"),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A model and its runs.

    Attributes:
      label: what it is called.
      folders: [S] names of the runs' folders, one for each seed.
      parameters: trainable ones.
      attention_flops: of all layers, forward, per token of a full row.
      training_flops: per token, backward pass and KL included.
      tokens: that a run trained on.
      losses: [S] final validation losses, nats per token.
      bits_per_byte: [S].
      tokens_per_second: [S] medians over the training records.
      score_recall: [S] means over layers at the end of training; empty without a selection.
      by_length: by name of `LENGTH_SCORES` and length, [S or fewer] values.
    """

    label: str
    folders: tuple[str, ...]
    parameters: int
    attention_flops: float
    training_flops: float
    tokens: int
    losses: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    score_recall: tuple[float, ...]
    by_length: Mapping[str, Mapping[int, tuple[float, ...]]]


def read_contenders(paths: Sequence[str], results: Sequence[str] = ()) -> list[Contender]:
    """Reads runs, in the order given, and groups them.

    Args:
      paths: folders of finished runs.
      results: JSON files of `experiments.evaluate`, each named as its run's folder.

    Raises:
      RunFileError: a run's file is missing or damaged.
      ConfigError: a file of results is damaged, or of none of the runs.
    """
    runs = [read_run(path, selection=False) for path in paths]
    found = {pathlib.Path(path).stem: ResultsFile.read(path) for path in results}
    unknown = set(found) - {run.path.name for run in runs}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))}: results of none of the runs")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_without_seeds(run), []).append(run)
    labels = [group[0].label for group in groups.values()]
    return [
        _contender(
            label if labels.count(label) == 1 else group[0].path.name,
            group,
            [found[run.path.name] for run in group if run.path.name in found],
        )
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def mean(values: float | Sequence[float | None]) -> float:
    """The mean of what was measured; NaN of nothing."""
    numbers = [v for v in (values if isinstance(values, Sequence) else [values]) if v is not None]
    return float(np.mean(numbers)) if numbers else float("nan")


def _contender(label: str, runs: Sequence[Run], results: Sequence[ResultsFile]) -> Contender:
    config, length = runs[0].config, runs[0].config.data.sequence_length
    recalls = [run.evaluation.layers.get("score_recall", []) for run in runs]
    return Contender(
        label=label,
        folders=tuple(run.path.name for run in runs),
        parameters=cost.parameter_count(config).total,
        attention_flops=attention_flops_per_token(config),
        training_flops=cost.training_flops_per_token(config, length).sparse,
        tokens=runs[0].evaluation.step * config.data.batch_size * length,
        losses=tuple(run.evaluation.loss for run in runs),
        bits_per_byte=tuple(run.evaluation.bits_per_byte for run in runs),
        tokens_per_second=tuple(clock_median(run, "tokens_per_second") for run in runs),
        score_recall=tuple(mean(values) for values in recalls if values),
        by_length={name: _by_length(score, results) for name, score in LENGTH_SCORES.items()},
    )


def _by_length(score: LengthScore, results: Sequence[ResultsFile]) -> dict[int, tuple[float, ...]]:
    """Of each run the mean over variants, depths and layers."""
    found: dict[int, tuple[float, ...]] = {}
    for result in results:
        values: dict[int, list[float]] = {}
        for cell, measured in result.of_task(score.task):
            if score.variant in (None, cell.variant):
                number = mean(measured[score.value])
                values.setdefault(cell.length, []).append(number)
        for length, numbers in values.items():
            found[length] = (*found.get(length, ()), mean(numbers))
    return found


def _without_seeds(run: Run) -> str:
    values = dataclasses.asdict(run.config)
    for section, field in _SEEDS:
        del values[section][field]
    return repr(values)
