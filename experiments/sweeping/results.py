"""The state of a study as rows, its Pareto front, and `results.csv`."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from msa_jax.train.sweep import Direction, Objective, Sweep, Value

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
      number: of the trial; its folder is `trials/NNNN`.
      state: "complete", "pruned" (its config cannot work), "failed", "running" or "waiting".
      parameters: by field; empty before the trial was begun.
      values: by objective; empty unless complete.
      on_front: no other complete trial is at least as good everywhere and better somewhere.
      seconds: of training, over all starts that ended by themselves or by a signal.
      same_as: the trial whose values these are, where a search came back to its point.
      error: why it was pruned or failed.
    """

    number: int
    state: str
    parameters: Mapping[str, Value]
    values: Mapping[str, float]
    on_front: bool
    seconds: float
    same_as: int | None
    error: str


def read_rows(study: optuna.Study, sweep: Sweep) -> list[Row]:
    """The trials that belong to the sweep, by number."""
    trials = [
        trial for trial in study.get_trials(deepcopy=False) if trial.number < sweep.total_trials
    ]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    front = pareto_front(
        np.array([trial.values for trial in complete]).reshape(-1, len(sweep.objectives)),
        [objective.direction for objective in sweep.objectives],
    )
    best = {trial.number for trial, on_front in zip(complete, front, strict=True) if on_front}
    return [_row(trial, sweep.objectives, trial.number in best) for trial in trials]


def pareto_front(values: np.ndarray, directions: Sequence[Direction]) -> np.ndarray:
    """Which points no other point dominates.

    A point dominates another when it is at least as good in every objective and better in one; of
    equal points all are on the front.

    Args:
      values: [N, M] finite.
      directions: [M].

    Returns:
      [N] bool.
    """
    signs = np.where(np.array(directions) == "minimize", 1.0, -1.0)
    costs = values * signs
    as_good = (costs[:, None] <= costs[None]).all(-1)
    better = (costs[:, None] < costs[None]).any(-1)
    return ~(as_good & better).any(0)


def to_csv(rows: Sequence[Row], sweep: Sweep) -> str:
    """All trials, a line each; cells that do not apply are empty."""
    fields = [parameter.field for parameter in sweep.parameters]
    names = [objective.name for objective in sweep.objectives]
    head = ["number", "state", *fields, *names, "on_front", "seconds", "same_as", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        end = [int(row.on_front), f"{row.seconds:.1f}", row.same_as, row.error]
        parameters = [row.parameters.get(field, "") for field in fields]
        writer.writerow(
            [row.number, row.state, *parameters, *(row.values.get(name) for name in names), *end]
        )
    return text.getvalue()


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file that is whole at every moment."""
    replacement = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replacement.write_text(text, encoding="utf-8")
    os.replace(replacement, path)


def _row(trial: FrozenTrial, objectives: Sequence[Objective], on_front: bool) -> Row:
    values = trial.values or [] if trial.state == TrialState.COMPLETE else []
    names: list[str] = [objective.name for objective in objectives] if values else []
    attributes = trial.user_attrs
    return Row(
        number=trial.number,
        state=STATES[trial.state],
        parameters=dict(trial.params),
        values=dict(zip(names, values, strict=True)),
        on_front=on_front,
        seconds=attributes.get("seconds", 0.0),
        same_as=attributes.get("same_as"),
        error=attributes.get("error", ""),
    )
