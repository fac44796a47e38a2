"""One trial's training: a process of its own, in a work directory of its own, with a log."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments.sweeping.locks import FileLock

TRAIN = (sys.executable, "-m", "experiments.train")
_STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM)}
_ARGUMENTS, _LOG, LOCK = "arguments.json", "log.txt", "worker.lock"


class WorkDirectoryError(ValueError):
    """A trial's folder that holds another trial."""


def trial_folder(workdir: pathlib.Path, number: int) -> pathlib.Path:
    """Where a trial lives."""
    return workdir / "trials" / f"{number:04d}"


class Training:
    """A training that is waiting for its folder, running, or ended.

    Args:
      folder: of the trial; made if absent. Training goes on from a checkpoint that is in it.
      arguments: of `command`, without the work directory.
      command: the training script.
      owner: who runs it, for the folder's lock.
    """

    def __init__(
        self, folder: pathlib.Path, arguments: Sequence[str], command: Sequence[str], owner: str
    ):
        self.folder = folder
        self._arguments, self._command, self._owner = list(arguments), list(command), owner
        self._lock = FileLock(folder / LOCK)
        self._process: subprocess.Popen | None = None
        self._began = 0.0

    def start(self) -> bool:
        """Starts the process; False while another process works in the folder.

        That is so where a worker was killed and its training went on.

        Raises:
          WorkDirectoryError: the folder is of another trial.
        """
        if not self._lock.acquire(self._owner):
            return False
        self._claim_folder()
        with (self.folder / _LOG).open("ab") as log:
            # A session of its own: Ctrl-C reaches the worker alone, which passes it on once. A
            # second signal would end the training before its checkpoint.
            self._process = subprocess.Popen(
                [*self._command, *self._arguments, f"--workdir={self.folder}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock.descriptor,),
            )
        self._began = time.monotonic()
        return True

    @property
    def started(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal's number after a kill; None while it runs or waits."""
        return None if self._process is None else self._process.poll()

    @property
    def seconds(self) -> float:
        """Since the process began."""
        return time.monotonic() - self._began if self.started else 0.0

    @property
    def interrupted(self) -> int | None:
        """The signal that it stopped for, with a checkpoint; None otherwise."""
        code = self.code
        return code - 128 if code in _STOPPED else None

    def stop(self, number: int) -> None:
        """Asks it to stop after the running step."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self) -> None:
        """Waits for the end of the process, if there is one."""
        if self._process is not None:
            self._process.wait()

    def release(self) -> None:
        """Gives the folder free; a trial that then still counts as running is taken for lost."""
        self._lock.close()

    def error(self) -> str:
        """What an ended training said last, and its exit code."""
        code = self.code or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = (self.folder / _LOG).read_text(errors="replace").splitlines()
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {said[-800:]}" if said else how

    def _claim_folder(self) -> None:
        """A folder holds one command's run, never the leftovers of another study."""
        path = self.folder / _ARGUMENTS
        if path.exists():
            there = json.loads(path.read_text())
            if there != self._arguments:
                raise WorkDirectoryError(
                    f"{self.folder} holds another trial ({' '.join(there)}): move it away, or take "
                    "another --workdir"
                )
            return
        replacement = path.with_suffix(".json.tmp")
        replacement.write_text(json.dumps(self._arguments))
        os.replace(replacement, path)
