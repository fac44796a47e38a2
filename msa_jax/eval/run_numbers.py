"""What reports say of a run in one number, and how numbers are written."""

import numpy as np

from msa_jax import cost
from msa_jax.eval.runs import Run, series
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.metrics import CLOCK_PREFIX


def clock_median(run: Run, name: str) -> float:
    """Of a clock metric over the training records; the first, which holds compilation, aside."""
    values = series(run.train, f"{CLOCK_PREFIX}{name}")[1]
    return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else np.nan


def attention_flops_per_token(config: ExperimentConfig) -> float:
    """Of all layers, forward, index scores included: the mean over a document of a full row."""
    flops = cost.model_flops(config, config.data.sequence_length)
    return (flops.attention + flops.index_scores) / config.data.sequence_length


def short_number(value: float | int) -> str:
    """Three significant digits with the field's suffixes: 1.47B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def percent(value: float, reference: float) -> str:
    """The difference from a reference, with its sign; nothing where either is unknown."""
    if np.isnan(value) or np.isnan(reference) or not reference:
        return ""
    if value == reference:
        return "same"
    return f"{100 * (value - reference) / reference:+.2f} %".replace("-", "\N{MINUS SIGN}")
