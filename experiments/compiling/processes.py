"""Runs orders in worker processes, each with a folder of its own for the compiler's dumps."""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.compiling.dumps import dumping_to
from experiments.compiling.worker import DUMP_VARIABLE, MARK

Record = dict[str, Any]


def run(orders: Sequence[Record], *, workers: int) -> Iterator[Record]:
    """The answers, in the order of the orders.

    Args:
      orders: as `experiments.compiling.worker` takes them.
      workers: processes at a time.
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from pool.map(_answer, orders)


def _answer(order: Record) -> Record:
    """What one process says of an order, or that it failed."""
    with tempfile.TemporaryDirectory(prefix="compile_check_") as folder:
        variables = dumping_to(pathlib.Path(folder)) | {DUMP_VARIABLE: folder}
        ended = subprocess.run(
            [sys.executable, "-m", "experiments.compiling.worker"],
            input=json.dumps(order) + "\n",
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | variables,
        )
    for line in ended.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    tail = " | ".join(ended.stderr.split("\n")[-6:]).strip(" |")
    return order | {"error": f"its process ended with exit code {ended.returncode}: {tail[:800]}"}
