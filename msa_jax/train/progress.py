"""Progress on standard error: a live bar on a terminal, plain lines anywhere else."""

import time
from typing import Protocol, runtime_checkable

import rich.console
import rich.progress


@runtime_checkable
class Progress(Protocol):
    """What the training loop reports to; `TrainingProgress` and `NoProgress` are two of them."""

    def update(
        self, step: int, *, phase: str, loss: float | None = None, rate: float | None = None
    ) -> None:
        """Reports `step` finished steps; loss and rate (tokens/s) stay as they were when None."""

    def message(self, text: str) -> None:
        """Reports an event, such as a checkpoint or an evaluation."""


class NoProgress:
    """Reports nothing."""

    def update(
        self, step: int, *, phase: str, loss: float | None = None, rate: float | None = None
    ) -> None:
        """Does nothing."""

    def message(self, text: str) -> None:
        """Does nothing."""


class TrainingProgress:
    """Phase, step, loss, tokens/s and time left; a context manager that hides no exception.

    Args:
      total: steps of the whole run.
      title: what is being trained.
      plain_every: steps between lines where there is no terminal.
      console: where to write, standard error by default.
    """

    def __init__(
        self,
        total: int,
        *,
        title: str = "train",
        plain_every: int = 10,
        console: rich.console.Console | None = None,
    ):
        self._total = total
        self._title = title
        self._plain_every = plain_every
        self._console = console or rich.console.Console(stderr=True)
        self._loss: float | None = None
        self._rate: float | None = None
        self._start: tuple[int, float] | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        if self._console.is_terminal:
            self._bar = _make_bar(self._console)

    def __enter__(self) -> "TrainingProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, phase="compile", figures=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, *, phase: str, loss: float | None = None, rate: float | None = None
    ) -> None:
        """Reports `step` finished steps; loss and rate (tokens/s) stay as they were when None."""
        self._loss = self._loss if loss is None else loss
        self._rate = self._rate if rate is None else rate
        if self._bar is not None and self._task is not None:
            figures = self._figures()
            self._bar.update(self._task, completed=step, phase=phase, figures=figures)
        elif step % self._plain_every == 0 or step == self._total:
            parts = [f"{self._title}: {phase}, step {step}/{self._total}", self._figures()]
            left = self._time_left(step)
            parts += [f"{left:.0f} s left"] if left is not None else []
            self.message(", ".join(part for part in parts if part))
        if self._start is None:
            # The first step is mostly compilation and, on resuming, stands for many.
            self._start = (step, time.monotonic())

    def message(self, text: str) -> None:
        """Writes one line, above the bar where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _figures(self) -> str:
        figures = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        figures += [] if self._rate is None else [f"{self._rate:,.0f} tokens/s"]
        return ", ".join(figures)

    def _time_left(self, step: int) -> float | None:
        if self._start is None or step <= self._start[0]:
            return None
        seconds = (time.monotonic() - self._start[1]) / (step - self._start[0])
        return seconds * (self._total - step)


def _make_bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}: {task.fields[phase]}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[figures]}", markup=False),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )
