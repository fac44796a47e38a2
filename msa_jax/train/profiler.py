"""A profile of a few training steps, for XProf, Perfetto or `experiments.profile_table`."""

import os
import pathlib

import jax

from msa_jax.train.config import TrainConfig


class ProfilerWindow:
    """Traces steps `profile_start` to `profile_start + profile_steps - 1`; a context manager.

    Args:
      config: the window; without `profile_steps` nothing is traced.
      workdir: the trace goes to `workdir/profile`.
    """

    def __init__(self, config: TrainConfig, workdir: str | os.PathLike[str]):
        self._steps = range(config.profile_start, config.profile_start + config.profile_steps)
        self._directory = pathlib.Path(workdir) / "profile"
        self._tracing = False

    def __enter__(self) -> "ProfilerWindow":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False

    def turns_before(self, step: int) -> bool:
        """Whether `before_step` will start or stop the trace: no step should run meanwhile."""
        return (step in self._steps) != self._tracing

    def before_step(self, step: int) -> None:
        """Starts or stops the trace; call before every step.

        Args:
          step: the one about to run, counted from 1.
        """
        if not self.turns_before(step):
            return
        if self._tracing:
            jax.profiler.stop_trace()
        else:
            jax.profiler.start_trace(self._directory)
        self._tracing = not self._tracing
