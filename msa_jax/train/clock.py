"""Where the wall clock's time goes, model FLOPs utilisation from it, and memory."""

import collections
import contextlib
import time
from collections.abc import Generator

import jax

from msa_jax import cost, utilisation
from msa_jax.config import ArchitectureConfig
from msa_jax.cost import Phase
from msa_jax.train.metrics import CLOCK_PREFIX


class StepClock:
    """Sums seconds and tokens between two metric records.

    Args:
      config: of the model, for its FLOPs.
      devices: that the model runs on.
    """

    def __init__(self, config: ArchitectureConfig, devices: list[jax.Device]):
        self._config = config
        self._devices = devices
        self._compiled: set[tuple[Phase, int]] = set()
        self._began: collections.deque[float] = collections.deque()
        self._ended = 0.0
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._steps = 0
        self._tokens = 0

    @contextlib.contextmanager
    def measure(self, name: str) -> Generator[None]:
        """Adds the block's time to `clock/<name>_seconds`."""
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start

    def begin_step(self) -> None:
        """Notes that a step is about to be started; the ones before may run still."""
        self._began.append(time.perf_counter())

    def add_step(self, phase: Phase, length: int, tokens: int) -> float | None:
        """Counts the earliest step that was begun and is over now.

        It took the time since it was begun, or since the step before was over if that is less. The
        first step of a phase and length goes to `clock/compile_seconds`, which so holds one step
        besides.

        Args:
          phase: of the step.
          length: tokens per row.
          tokens: real ones, no padding, in its batch.

        Returns:
          Tokens per second; None for a first step.
        """
        began, self._ended = max(self._began.popleft(), self._ended), time.perf_counter()
        seconds = self._ended - began
        if (phase, length) not in self._compiled:
            self._compiled.add((phase, length))
            self._seconds["compile"] += seconds
            return None
        self._seconds["step"] += seconds
        self._steps += 1
        self._tokens += tokens
        return tokens / seconds

    def take(self, phase: Phase, length: int) -> dict[str, float]:
        """The fields of a record, and a fresh start.

        Args:
          phase: whose FLOPs count.
          length: tokens per row. Documents are counted as if each filled a row, so with shorter
            ones the utilisation is an upper bound.

        Returns:
          `clock/step_seconds` (mean), `clock/tokens_per_second` and, on a device whose peak is
          known, `clock/mfu_sparse` and `clock/mfu_dense_equivalent` (see `msa_jax.cost`), all of
          timed steps; sums of what `measure` saw and of compilation; and where devices count it (a
          CPU does not) `clock/peak_memory_bytes`, the fullest device's most since the process
          began.
        """
        seconds = dict(self._seconds)
        step_seconds = seconds.pop("step", 0.0)
        fields = {f"{name}_seconds": value for name, value in seconds.items()}
        if self._steps:
            rate = self._tokens / step_seconds
            fields |= {"step_seconds": step_seconds / self._steps, "tokens_per_second": rate}
            flops = cost.training_flops_per_token(self._config, length, phase=phase)
            for name, per_token in flops._asdict().items():
                kind = self._devices[0].device_kind
                found = utilisation.mfu(per_token, rate, kind, len(self._devices))
                fields |= {} if found is None else {f"mfu_{name}": found}
            peak = max(map(_peak_bytes, self._devices))
            fields |= {"peak_memory_bytes": peak} if peak else {}
        self._seconds.clear()
        self._steps = self._tokens = 0
        return {f"{CLOCK_PREFIX}{name}": value for name, value in fields.items()}


def _peak_bytes(device: jax.Device) -> int:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
