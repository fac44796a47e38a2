"""Runs cases one after another in processes of their own and keeps every record as it comes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.benchmarking.cases import MARK, MSA, PHASE, Case

Record = dict[str, Any]

# Autotuning Triton kernels around the float32 products of the oracle takes XLA half a minute. The
# ceilings keep whatever is fastest.
XLA_FLAGS = {MSA: "--xla_gpu_enable_triton_gemm=false"}
# Beside `case_seconds`, for what compiles for minutes at its first call.
_FIRST_CALL_SECONDS = {"flash_msa": 120.0}


def run(
    cases: Sequence[Case],
    output: pathlib.Path,
    environment: Record,
    *,
    case_seconds: float,
    total_seconds: float,
    report: Callable[[str], None],
) -> None:
    """Runs cases and appends to `output`, JSON lines: the environment, then a record per line.

    Args:
      cases: in order.
      output: file of JSON lines; an earlier run in it stays.
      environment: of this run.
      case_seconds: after which a case is ended; flash-msa has two minutes more to compile.
      total_seconds: after which no case is begun; those left get a record that says so.
      report: is given a line of progress.
    """
    end = time.monotonic() + total_seconds
    with output.open("a", encoding="utf-8") as file:

        def keep(line: Record) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        keep({"environment": environment})
        for case in cases:
            start = time.monotonic()
            limit = case_seconds + _FIRST_CALL_SECONDS.get(case.subject, 0)
            records = list(_records(case, min(limit, end - start)))
            for record in records:
                keep({"case": dataclasses.asdict(case)} | record)
            errors = [record["error"] for record in records if "error" in record]
            seconds = time.monotonic() - start
            report(f"{case.label}: {seconds:.0f} s" + "".join(f"\n  {text}" for text in errors))


class _Phases:
    """How long a process took for what it said it was doing; tells standard error as it goes."""

    def __init__(self, label: str):
        self.name, self._label, self._entered = "start", label, time.monotonic()
        self._seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """Ends a phase and begins another."""
        now = time.monotonic()
        spent = now - self._entered
        print(f"{self._label}: {spent:6.1f} s {self.name}", file=sys.stderr, flush=True)
        self._seconds[self.name] = round(self._seconds.get(self.name, 0.0) + spent, 2)
        self.name, self._entered = name, now

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last record."""
        self.enter(self.name)
        taken, self._seconds = self._seconds, {}
        return taken


def _records(case: Case, seconds: float) -> Iterator[Record]:
    """The records of one process; what it was doing and printed last if it failed without one."""
    if seconds <= 0:
        yield {"error": "not run: the run's time was over"}
        return
    command = [sys.executable, "-m", "experiments.benchmarking.worker"]
    flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), XLA_FLAGS.get(case.subject)]))
    tail, failed, phases = [], False, _Phases(case.label)
    with subprocess.Popen(
        [*command, json.dumps(dataclasses.asdict(case))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ | {"XLA_FLAGS": flags},
    ) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith(MARK):
                record = json.loads(line.removeprefix(MARK))
                failed |= "error" in record
                yield record | {"phases": phases.take()}
            elif line.startswith(PHASE):
                phases.enter(line.removeprefix(PHASE).strip())
            else:
                tail = [*tail[-4:], line.strip()]
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
    if code and not failed:
        reason = f"ended after {seconds:.0f} s" if late else f"exit code {code}"
        doing = phases.name
        error = f"{reason}, in its phase {doing!r}: {' | '.join(tail)[-800:]}"
        yield {"error": error.rstrip(": "), "phases": phases.take()}
