"""Finished runs of several models, each with several seeds, side by side.

Runs whose configs differ in seeds alone are one *contender*. What is compared is read from the
runs' own files and from the results of the long-context evaluation (`ResultsFile`).
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msa_jax import cost
from msa_jax.config import ConfigError
from msa_jax.eval import figures
from msa_jax.eval.heat_map import heat_map
from msa_jax.eval.long_context import ResultsFile, Task
from msa_jax.eval.run_figures import CaptionedFigure, Figures
from msa_jax.eval.run_numbers import (
    attention_flops_per_token,
    clock_median,
    percent,
    short_number,
)
from msa_jax.eval.runs import Run, read_run
from msa_jax.eval.tables import Table
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
# Those that are shares, and make a heat map each.
_SHARES = ("needle", "ruler", "recall")


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


def main_table(contenders: Sequence[Contender], reference: str) -> Table:
    """What each costs and how well it predicts; losses also relative to a contender's.

    Raises:
      ConfigError: `reference` is the label of none.
    """
    base = _mean(_named(contenders, reference).losses)
    head = [
        "",
        "parameters",
        "attention FLOPs per token",
        "training FLOPs per token",
        "tokens per second",
        "validation loss",
        f"relative to {reference}",
        "bits per byte",
        "score recall",
    ]
    rows = [
        [
            one.label,
            short_number(one.parameters),
            short_number(one.attention_flops),
            short_number(one.training_flops),
            f"{_mean(one.tokens_per_second):,.0f}",
            _with_spread(one.losses, 4),
            percent(_mean(one.losses), base),
            _with_spread(one.bits_per_byte, 4),
            _with_spread(one.score_recall, 3),
        ]
        for one in contenders
    ]
    return head, rows


def length_table(contenders: Sequence[Contender], score: str) -> Table:
    """One of `LENGTH_SCORES`, a row per contender, a column per length."""
    lengths = _lengths(contenders, score)
    head = [LENGTH_SCORES[score].title, *map(figures.short_length, lengths)]
    digits = 4 if score == "loss" else 3
    return head, [
        [one.label, *(_with_spread(one.by_length[score].get(n, ()), digits) for n in lengths)]
        for one in contenders
        if one.by_length[score]
    ]


def length_tables(contenders: Sequence[Contender]) -> Iterable[Table]:
    """Of every score that was measured."""
    for score in LENGTH_SCORES:
        if _lengths(contenders, score):
            yield length_table(contenders, score)


def comparison_figures(contenders: Sequence[Contender]) -> Figures:
    """Losses, and a heat map for each share, by file name."""
    found = {"losses": CaptionedFigure(_losses(contenders), _LOSS_CAPTION)}
    for score in _SHARES:
        lengths = _lengths(contenders, score)
        rows = [one for one in contenders if one.by_length[score]]
        if lengths:
            values = [[_mean(one.by_length[score].get(n, ())) for n in lengths] for one in rows]
            svg = heat_map(
                np.array(values),
                [one.label for one in rows],
                [figures.short_length(length) for length in lengths],
                x="context (tokens)",
                y="",
                title=LENGTH_SCORES[score].title,
            )
            caption = f"{LENGTH_SCORES[score].title.capitalize()}: means over seeds and examples."
            found[score] = CaptionedFigure(svg, caption)
    return found


_LOSS_CAPTION = (
    "Validation loss: the mean over seeds, and a bar from the lowest to the highest. Beside each "
    "name its forward attention FLOPs per token of a full row; the dearest stand on top."
)


def _losses(contenders: Sequence[Contender]) -> str:
    rows = sorted(contenders, key=lambda one: one.attention_flops)
    with figures.drawing_style():
        figure, (axes,) = figures.make_panels(1, height=1.2 + 0.3 * len(rows))
        for row, one in enumerate(rows):
            mean = _mean(one.losses)
            ends = [[mean - min(one.losses)], [max(one.losses) - mean]]
            colour = figures.SERIES[one.label == "MSA"]
            axes.errorbar([mean], [row], xerr=ends, color=colour, marker="o", capsize=3)
        names = [f"{one.label}, {short_number(one.attention_flops)}" for one in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.margins(y=0.08)
        figures.label_axes(axes, "validation loss (nats per token)", "", steps=False)
        return figures.finish(figure)


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
        score_recall=tuple(_mean(values) for values in recalls if values),
        by_length={name: _by_length(score, results) for name, score in LENGTH_SCORES.items()},
    )


def _by_length(score: LengthScore, results: Sequence[ResultsFile]) -> dict[int, tuple[float, ...]]:
    """Of each run the mean over variants, depths and layers."""
    found: dict[int, tuple[float, ...]] = {}
    for result in results:
        values: dict[int, list[float]] = {}
        for cell, measured in result.of_task(score.task):
            if score.variant in (None, cell.variant):
                number = _mean(measured[score.value])
                values.setdefault(cell.length, []).append(number)
        for length, numbers in values.items():
            found[length] = (*found.get(length, ()), _mean(numbers))
    return found


def _without_seeds(run: Run) -> str:
    values = dataclasses.asdict(run.config)
    for section, field in _SEEDS:
        del values[section][field]
    return repr(values)


def _named(contenders: Sequence[Contender], label: str) -> Contender:
    for one in contenders:
        if one.label == label:
            return one
    labels = ", ".join(one.label for one in contenders)
    raise ConfigError(f"{label!r} is none of what is compared: {labels}")


def _lengths(contenders: Sequence[Contender], score: str) -> list[int]:
    return sorted({length for one in contenders for length in one.by_length[score]})


def _mean(values: float | Sequence[float | None]) -> float:
    """Of what was measured; NaN of nothing."""
    numbers = [v for v in (values if isinstance(values, Sequence) else [values]) if v is not None]
    return float(np.mean(numbers)) if numbers else float("nan")


def _with_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and half of the way from the lowest to the highest."""
    if not values:
        return "-"
    text = f"{_mean(values):.{digits}f}"
    half = (max(values) - min(values)) / 2
    return text if len(values) == 1 else f"{text} \N{PLUS-MINUS SIGN} {half:.{digits}f}"
