"""Who runs a trial, whether that worker is still alive, and giving its trial back if not.

Optuna's heartbeats exist for databases alone and end a lost trial as failed. Here a worker writes a
lease into its trial and renews it, through any storage; a trial whose worker is lost goes back to
the queue under its own number, so that whoever takes it finds its checkpoint.

A worker is lost when its lease was not renewed for a while by the clock of the one who watches
(clocks of machines differ), or at once when it ran on this machine and the lock on the trial's
folder, which the system takes back from dead processes, is free.
"""

import contextlib
import dataclasses
import os
import pathlib
import platform
import time
import uuid
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from experiments.sweeping.locks import FileLock, abandoned
from experiments.sweeping.training import LOCK, trial_folder

_LEASE, _LOST = "lease", "lost"
# A trial that takes its worker down with it, by the machine's memory say, ends as failed.
MAX_LOST = 3


@dataclasses.dataclass
class Leases:
    """One worker's leases, and what it has seen of others'.

    Attributes:
      storage: of the study.
      study: the trials are of it.
      workdir: of the sweep on this machine.
      stale_after: seconds without renewal after which a worker counts as lost.
    """

    storage: BaseStorage
    study: optuna.Study
    workdir: pathlib.Path
    stale_after: float
    owner: str = dataclasses.field(default_factory=lambda: new_owner())
    _seen: dict[int, tuple[Any, float]] = dataclasses.field(default_factory=dict)
    _renewed: dict[int, float] = dataclasses.field(default_factory=dict)

    def renew(self, trial: optuna.Trial) -> None:
        """Writes the lease, if a quarter of its time has passed."""
        now = time.monotonic()
        if now - self._renewed.get(trial.number, -self.stale_after) < self.stale_after / 4:
            return
        self._renewed[trial.number] = now
        lease = {"owner": self.owner, "host": platform.node(), "renewed": time.time()}
        # It may have been taken for lost, and finished by another; our result will be dropped.
        with contextlib.suppress(UpdateFinishedTrialError):
            trial.set_user_attr(_LEASE, lease)

    def give_back(self, trial: optuna.Trial | FrozenTrial) -> None:
        """Puts a running trial back into the queue, its point and folder with it."""
        with contextlib.suppress(UpdateFinishedTrialError):
            # In this order: who saw the old lease and comes late finds that it changed.
            self.storage.set_trial_user_attr(trial._trial_id, _LEASE, None)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def recover(self, trials: list[FrozenTrial], mine: set[int]) -> list[int]:
        """Gives back the trials of lost workers; returns their numbers.

        Args:
          trials: of the study.
          mine: numbers of those that this worker runs.
        """
        running = [one for one in trials if one.state == TrialState.RUNNING]
        suspects = [one for one in running if one.number not in mine and self._is_lost(one)]
        recovered = []
        for suspect in suspects:
            # Workers that share a disk take turns, so that one of them acts.
            with FileLock(self.workdir / "recovery.lock") as lock:
                lock.acquire(self.owner, wait=True)
                now = self.storage.get_trial(suspect._trial_id)
                lease = suspect.user_attrs.get(_LEASE)
                if now.state == TrialState.RUNNING and now.user_attrs.get(_LEASE) == lease:
                    self._recover(now)
                    recovered.append(now.number)
        return recovered

    def _recover(self, trial: FrozenTrial) -> None:
        lost = trial.user_attrs.get(_LOST, 0) + 1
        self.storage.set_trial_user_attr(trial._trial_id, _LOST, lost)
        if lost >= MAX_LOST:
            error = f"its worker was lost {lost} times: {trial.user_attrs.get(_LEASE)}"
            self.storage.set_trial_user_attr(trial._trial_id, "error", error)
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self.give_back(trial)

    def _is_lost(self, trial: FrozenTrial) -> bool:
        lease, now = trial.user_attrs.get(_LEASE), time.monotonic()
        if lease and lease["host"] == platform.node():
            lock = trial_folder(self.workdir, trial.number) / LOCK
            if abandoned(lock, lease["owner"]):
                return True
        before, since = self._seen.setdefault(trial.number, (lease, now))
        if before != lease:
            self._seen[trial.number] = (lease, now)
            return False
        return now - since > self.stale_after


def new_owner() -> str:
    """A name that no other worker has."""
    return f"{platform.node()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
