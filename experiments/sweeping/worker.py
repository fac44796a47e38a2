"""A worker: takes trials from the study, trains them in processes, records how they ended.

Any number of workers share a study. Nothing is agreed between them but what the storage holds: a
trial is waiting, running (with the lease of its worker) or finished, and only the storage's own
atomic step takes it from waiting to running.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from experiments.sweeping.leases import Leases
from experiments.sweeping.objectives import ObjectiveError, read_objectives
from experiments.sweeping.points import ExcludedError, Space
from experiments.sweeping.samplers import suggest
from experiments.sweeping.training import TRAIN, Training, WorkDirectoryError, trial_folder
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.interrupt import Interruption
from msa_jax.train.sweep import Value

_TICK_SECONDS = 0.02


@dataclasses.dataclass
class _Active:
    """A trial of this worker."""

    trial: optuna.Trial
    config: ExperimentConfig
    training: Training


class Worker:
    """Runs trials until the study has none left.

    Args:
      study: to work on, of `storage`.
      storage: the study's.
      space: the sweep.
      workdir: trials live in `trials/NNNN` of it.
      jobs: trainings at a time.
      stale_after: seconds after which a silent worker counts as lost.
      poll_seconds: between looks at the storage while others work.
      command: the training script, given the point's flags and `--workdir`.
      tell: is given a line of progress.
      on_finished: called after every trial that ended.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        space: Space,
        workdir: pathlib.Path,
        *,
        jobs: int = 1,
        stale_after: float = 120.0,
        poll_seconds: float = 2.0,
        command: Sequence[str] = TRAIN,
        tell: Callable[[str], None] = print,
        on_finished: Callable[[], object] = lambda: None,
    ):
        self._study, self._storage, self._space, self._workdir = study, storage, space, workdir
        self._jobs, self._poll_seconds, self._command = jobs, poll_seconds, command
        self._say, self._on_finished = tell, on_finished
        self._leases = Leases(storage, study, workdir, stale_after)
        self._active: list[_Active] = []

    def run(self) -> int:
        """Works; returns 0 when every trial has ended, 128 + the signal's number after a signal."""
        with Interruption() as interruption:
            try:
                stopped = self._loop(interruption)
            except BaseException:
                self._stop(signal.SIGTERM)
                raise
        return 0 if stopped is None else 128 + stopped

    def _loop(self, interruption: Interruption) -> int | None:
        while True:
            stopped = self._tend() or interruption.signal
            if stopped is not None:
                self._say(f"{signal.Signals(stopped).name}: waiting for checkpoints")
                self._stop(stopped)
                return stopped
            if len(self._active) < self._jobs:
                if self._begin_next():
                    continue
                if not self._active and self._all_finished():
                    return None
            self._pause(interruption)

    def _pause(self, interruption: Interruption) -> None:
        """Waits until something happens here, or until it is time to look at the storage."""
        end = time.monotonic() + self._poll_seconds
        while time.monotonic() < end and interruption.signal is None:
            if any(one.training.code is not None for one in self._active):
                return
            time.sleep(_TICK_SECONDS)

    def _tend(self) -> int | None:
        """Looks after the active trials; returns the signal that one was stopped by, or None."""
        for one in list(self._active):
            if not one.training.started:
                self._start(one)
            elif one.training.interrupted is not None:
                return one.training.interrupted  # Sent to all processes; ours is on its way.
            elif one.training.code is not None:
                self._finish(one)
                continue
            self._leases.renew(one.trial)
        return None

    def _trials(self) -> list[FrozenTrial]:
        """The study's trials, but for what workers that raced asked for beyond its size."""
        total = self._space.sweep.total_trials
        return [one for one in self._study.get_trials(deepcopy=False) if one.number < total]

    def _all_finished(self) -> bool:
        trials = self._trials()
        done = all(one.state.is_finished() for one in trials)
        return done and len(trials) == self._space.sweep.total_trials

    def _begin_next(self) -> bool:
        """Takes a trial, if one can be had."""
        trials, total = self._trials(), self._space.sweep.total_trials
        for number in self._leases.recover(trials, {one.trial.number for one in self._active}):
            self._say(f"trial {number}: its worker was lost")
        states = [one.state for one in self._trials()]
        if TrialState.WAITING not in states and len(states) >= total:
            return False
        trial = self._study.ask()
        if trial.number >= total:
            self._leases.give_back(trial)
            return False
        self._leases.renew(trial)
        self._begin(trial)
        return True

    def _begin(self, trial: optuna.Trial) -> None:
        sweep = self._space.sweep
        point = suggest(trial, sweep.parameters)
        try:
            config = self._space.config(point)
        except ExcludedError as error:
            return self._record(trial, TrialState.PRUNED, error=str(error))
        twin = self._twin(trial.number, point)
        if twin is not None:
            trial.set_user_attr("same_as", twin.number)
            return self._record(trial, TrialState.COMPLETE, values=twin.values)
        folder = trial_folder(self._workdir, trial.number)
        arguments = self._space.arguments(point)
        training = Training(folder, arguments, self._command, self._leases.owner)
        self._active.append(_Active(trial, config, training))
        self._say(f"trial {trial.number}: {describe(point)}")
        self._start(self._active[-1])

    def _start(self, one: _Active) -> None:
        try:
            one.training.start()
        except (WorkDirectoryError, OSError) as error:
            self._active.remove(one)
            self._record(one.trial, TrialState.FAIL, error=str(error))
            one.training.release()

    def _twin(self, number: int, point: dict[str, Value]) -> FrozenTrial | None:
        """An earlier trial that already scored this point: searches come back to good ones."""
        for other in self._trials():
            done = other.state == TrialState.COMPLETE and "same_as" not in other.user_attrs
            if done and other.number != number and other.params == point:
                return other
        return None

    def _finish(self, one: _Active) -> None:
        self._active.remove(one)
        self._add_seconds(one)
        try:
            if one.training.code != 0:
                raise ObjectiveError(one.training.error())
            objectives = self._space.sweep.objectives
            values = read_objectives(objectives, one.config, one.training.folder)
        except ObjectiveError as error:
            self._record(one.trial, TrialState.FAIL, error=str(error))
        else:
            self._record(one.trial, TrialState.COMPLETE, values=values)
        one.training.release()

    def _record(
        self,
        trial: optuna.Trial,
        state: TrialState,
        *,
        values: Sequence[float] | None = None,
        error: str = "",
    ) -> None:
        # Another worker may have taken it for lost, and been faster.
        with contextlib.suppress(UpdateFinishedTrialError):
            if error:
                trial.set_user_attr("error", error)
            if self._storage.get_trial(trial._trial_id).state == TrialState.WAITING:
                # Taken for lost, wrongly: the result counts, and nobody need begin again.
                self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            self._study.tell(trial, values, state=state, skip_if_finished=True)
        names = [objective.name for objective in self._space.sweep.objectives]
        scores = describe(dict(zip(names, values, strict=True))) if values is not None else error
        self._say(f"trial {trial.number}: {state.name.lower()}, {scores}")
        self._on_finished()

    def _stop(self, number: int) -> None:
        """Asks all trainings to stop, waits, and leaves their trials for the next start."""
        for one in self._active:
            one.training.stop(number)
        for one in list(self._active):
            one.training.wait()
            if one.training.code == 0:
                self._finish(one)
                continue
            self._active.remove(one)
            self._add_seconds(one)
            self._leases.give_back(one.trial)
            one.training.release()

    def _add_seconds(self, one: _Active) -> None:
        before = one.trial.user_attrs.get("seconds", 0.0)
        with contextlib.suppress(UpdateFinishedTrialError):
            one.trial.set_user_attr("seconds", before + one.training.seconds)


def describe(values: dict[str, Value] | dict[str, float]) -> str:
    """Fields by the last part of their names: `top_k=4, block_size=16`."""
    parts = []
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.rsplit('.', 1)[-1]}={shown}")
    return ", ".join(parts)
