"""Runs groups in processes of their own: a hang or a crash loses its group alone."""

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.checking.judgement import MARK, Record

# XLA would try out float64 products for minutes, in memory that the groups share.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": XLA_FLAGS}
# A group of a million tokens needs most of the memory, in one piece.
_ALONE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"}


def run(
    groups: Sequence[str], order: dict[str, Any], *, jobs: int, seconds: float
) -> Iterator[Record]:
    """The records of groups as they end.

    Args:
      groups: names, in the order in which they are begun.
      order: what else the worker is told.
      jobs: groups at a time; with one, a group has the whole GPU.
      seconds: after which a group is ended.
    """
    environment = os.environ | _ENVIRONMENT | (_ALONE if jobs == 1 else {})

    def one(group: str) -> list[Record]:
        start = time.monotonic()
        records = list(_records({"group": group} | order, environment, seconds))
        spent = time.monotonic() - start
        return [{"group": group, "group_seconds": spent} | record for record in records]

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, name) for name in groups]):
            yield from done.result()


def _records(
    order: dict[str, Any], environment: dict[str, str], seconds: float
) -> Iterator[Record]:
    """What one process printed; and that it failed, if it did not come to its end."""
    command = [sys.executable, "-m", "experiments.checking.worker", json.dumps(order)]
    reason = ""
    try:
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=seconds,
        )
        printed = ended.stdout
        if ended.returncode:
            reason = f"exit code {ended.returncode}"
    except subprocess.TimeoutExpired as late:
        printed, reason = late.stdout or b"", f"ended after {seconds:.0f} s"
    lines = printed.decode(errors="replace").splitlines()
    for line in lines:
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
    if reason:
        rest = [line.strip() for line in lines if not line.startswith(MARK)]
        error = f"{reason}: {' | '.join(rest[-5:])[-800:]}"
        yield {"case": "all cases of the group are checked", "error": error, "passed": False}
