"""The run manifest: what ran, with which versions, on what, started when."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

import msa_jax

PACKAGES = (
    "msa-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "numpy",
)


def write_manifest(
    workdir: str | os.PathLike[str], config: Any, *, resumed_from_step: int | None = None
) -> dict[str, Any]:
    """Adds this start of the run to `manifest.json`.

    The file is `{"starts": [...]}`: one entry for each process that worked in `workdir`, the first
    one and every resumed one.

    Args:
      workdir: the run's directory; made if absent.
      config: a dataclass, the whole configuration.
      resumed_from_step: the step of the restored checkpoint, None for a fresh start.

    Returns:
      The entry that was added.
    """
    path = pathlib.Path(workdir) / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    entry = describe_run(config) | {"resumed_from_step": resumed_from_step}
    replacement = path.with_suffix(".json.tmp")
    replacement.write_text(json.dumps({"starts": [*starts, entry]}, indent=2) + "\n")
    os.replace(replacement, path)
    return entry


def describe_run(config: Any) -> dict[str, Any]:
    """One manifest entry: start time, command line, host, devices, versions, git state, config."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git": git_state(pathlib.Path(msa_jax.__file__)),
        "config": dataclasses.asdict(config),
    }


def git_state(source: pathlib.Path) -> dict[str, Any] | None:
    """The commit of the checkout that tracks the file `source`, and whether it was changed since.

    None without a checkout, without a commit or without git: an installed package has none.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(source.parent), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return result.stdout.strip()

    try:
        # A package installed inside someone else's checkout is not tracked by it.
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
