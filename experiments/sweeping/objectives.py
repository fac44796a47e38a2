"""What a finished training scored."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from msa_jax import cost
from msa_jax.eval.runs import Evaluation, RunFileError, read_evaluation, series
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.metrics import CLOCK_PREFIX, metrics_path, read_metrics
from msa_jax.train.sweep import Objective

TITLES = {
    "validation_loss": "validation loss (nats per token)",
    "score_recall": "score recall",
    "attention_flops": "attention FLOPs per token",
    "tokens_per_second": "tokens per second",
}


class ObjectiveError(ValueError):
    """A finished training without a value for an objective; the message says why."""


def read_objectives(
    objectives: Sequence[Objective], config: ExperimentConfig, folder: pathlib.Path
) -> list[float]:
    """The values, in the order of the objectives.

    Args:
      objectives: of the sweep.
      config: of the trial.
      folder: its work directory, with `evaluation.json` and `metrics.jsonl`.

    Raises:
      ObjectiveError: a file is missing or damaged, or the model has no such value.
    """
    readers: dict[str, Callable[[], float]] = {
        "validation_loss": lambda: evaluation.loss,
        "score_recall": lambda: _score_recall(evaluation, config),
        "attention_flops": lambda: attention_flops(config),
        "tokens_per_second": lambda: _tokens_per_second(folder),
    }
    try:
        evaluation = read_evaluation(folder / "evaluation.json")
    except RunFileError as error:
        raise ObjectiveError(str(error)) from error
    values = [readers[objective.name]() for objective in objectives]
    for objective, value in zip(objectives, values, strict=True):
        if not np.isfinite(value):
            raise ObjectiveError(f"{objective.name} is {value}")
    return values


def attention_flops(config: ExperimentConfig) -> float:
    """Forward FLOPs of all attention layers per token of a full row, index scores included.

    Projections are left out. Computed by `msa_jax.cost`.
    """
    length = config.data.sequence_length
    flops = cost.model_flops(config, length)
    return (flops.attention + flops.index_scores) / length


def _score_recall(evaluation: Evaluation, config: ExperimentConfig) -> float:
    """Mean over the layers that select."""
    layers = evaluation.layers.get("score_recall", [])
    if not layers:
        raise ObjectiveError(
            f"score_recall: a model of attention.kind={config.attention.kind!r} selects no blocks"
        )
    if not any(layers):
        raise ObjectiveError(
            "score_recall: no query of the evaluation sees more blocks than "
            f"attention.top_k={config.attention.top_k}, so there is nothing to select"
        )
    return float(np.mean(layers))


def _tokens_per_second(folder: pathlib.Path) -> float:
    """Median of the training records after the first, which holds the compilation."""
    try:
        records = read_metrics(metrics_path(folder))
    except (OSError, ValueError) as error:
        raise ObjectiveError(f"tokens_per_second: {error}") from error
    train = [record for record in records if record.get("split") == "train"]
    rates = series(train, f"{CLOCK_PREFIX}tokens_per_second")[1]
    if not len(rates):
        raise ObjectiveError(
            f"tokens_per_second: {metrics_path(folder)} has no timed step; "
            "lower train.log_every or raise train.steps"
        )
    return float(np.median(rates[1:] if len(rates) > 1 else rates))
