"""The machine and the versions that a run's numbers depend on."""

import datetime
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

_PACKAGES = (
    "jax",
    "jax-cuda13-plugin",
    "torch",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-cutlass-dsl",
    "flash-attn-4",
    "flash-msa",
)
_GPU = ("name", "driver_version", "compute_cap", "power.limit", "clocks.max.sm", "memory.total")


def gpu() -> dict[str, str] | None:
    """The first GPU as `nvidia-smi` describes it, or None where there is none.

    Asked of the driver and not of jax, which would take the GPU's memory in this process.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    values = output.splitlines()[0].split(", ") if output.strip() else []
    return dict(zip(_GPU, values, strict=True)) if len(values) == len(_GPU) else None


def environment(script: str, argv: Sequence[str], *, method: str, xla_flags: Any) -> Record:
    """What a run's numbers depend on: device, versions, command, commit, and how they were taken.

    Args:
      script: module that was run.
      argv: its arguments.
      method: one sentence on what the numbers are.
      xla_flags: set for its processes beside the user's.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return {
        "gpu": gpu(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": " ".join([f"python -m {script}", *argv]),
        "commit": os.environ.get("BENCHMARK_COMMIT") or commit.stdout.strip() or None,
        "xla_flags": xla_flags,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "method": method,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
