"""Writes where a profiled run's time went: the operations that took the devices longest.

    python -m experiments.train --config=configs/h100_350m.py --workdir=runs/h100_350m/msa \\
        --config.train.profile_start=60 --config.train.profile_steps=3
    python -m experiments.profile_table --run=runs/h100_350m/msa --output=docs/benchmarks/profile

OUTPUT.json and OUTPUT.md hold the same numbers. A step in which something is compiled belongs
outside of the window: the first one, and the first after the index warm-up.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli
from msa_jax.eval import tables
from msa_jax.train.operation_times import TraceError, device_times

_LONGEST_NAME = 90


def main(argv: Sequence[str]) -> None:
    """Reads the run's trace and manifest, writes both files and prints the table."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.run:
        raise cli.UsageError("--run is missing: name the run's folder, --run=runs/h100_350m/msa")
    run, output = pathlib.Path(values.run), pathlib.Path(values.output)
    try:
        table = profile_table(run, values.top)
    except (TraceError, OSError, LookupError) as error:
        raise cli.UsageError(f"--run={run}: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    page = markdown(table)
    output.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


def profile_table(run: pathlib.Path, top: int) -> dict[str, Any]:
    """The run's longest operations and all of its traced steps, as plain values.

    Args:
      run: work directory of a run with a profile.
      top: how many operations.
    """
    times = device_times(run / "profile")
    entry = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["starts"][-1]
    train = entry["config"]["train"]
    steps = min(train["profile_steps"], train["steps"] - train["profile_start"] + 1)
    operations = [operation._asdict() for operation in times.operations[:top]]
    for operation in operations:
        operation["milliseconds_per_step"] = operation["milliseconds"] / steps
    return {
        "run": run.name,
        # Without the interpreter's and the script's path, which are of this machine alone.
        "command": " ".join(["python -m experiments.train", *entry["command"][2:]]),
        "devices": entry["devices"],
        "git": entry["git"],
        "first_step": train["profile_start"],
        "steps": steps,
        "milliseconds_per_step": times.window_ms / steps,
        "busy_share": times.busy_ms / times.window_ms,
        "operations": operations,
        "share_of_the_rest": 1 - sum(operation["share"] for operation in operations),
    }


def markdown(table: dict[str, Any]) -> str:
    """The table as a page."""
    lines = [
        f"# Where the time of {table['run']} goes",
        "",
        f"{table['steps']} steps from step {table['first_step']}, "
        f"{table['milliseconds_per_step']:.1f} ms each, devices busy "
        f"{table['busy_share']:.1%} of it; `{table['command']}`. Shares are of the time of all "
        "operations.",
        "",
    ]
    rows = [_row(operation) for operation in table["operations"]]
    rows.append(["all others", "", "", "", f"{table['share_of_the_rest']:.1%}"])
    head = ["operation", "of", "calls", "ms per step", "share"]
    return "\n".join([*lines, tables.markdown((head, rows), names=2)]) + "\n"


def _row(operation: dict[str, Any]) -> list[str]:
    name = operation["name"].replace("|", "\\|")
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    milliseconds, share = operation["milliseconds_per_step"], operation["share"]
    calls = str(operation["calls"])
    return [f"`{name}`", f"`{operation['hlo_op']}`", calls, f"{milliseconds:.2f}", f"{share:.1%}"]


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "folder of a profiled run; required", flag_values=values)
    flags.DEFINE_string("output", "profile", "path of both files, no suffix", flag_values=values)
    flags.DEFINE_integer("top", 10, "operations shown", lower_bound=1, flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
