"""Checks the kernels on an NVIDIA GPU against float64, for what they leave unwritten, and twice.

    python -m experiments.check_kernels --output=runs/checks
    python -m experiments.check_kernels --quick
    python -m experiments.check_kernels --million
    python -m experiments.check_kernels --implementation=triton --groups=gradients,alignment

Output, log-sum-exp and gradients of `sparse_attention`, of the Hopper kernels by both schemes and
the choice between them, selections of `select_blocks`, values and gradients of `index_kl`, and what
an 8-bit index costs. Device memory is filled with NaN before each run, and each case runs twice:
the results must be the same bit for bit. --quick checks 2K tokens alone, --million 1M tokens too,
--groups those groups alone whose names begin so. OUTPUT/checks.json has every figure.

Exit code: 0 if all passed, 1 if one failed, 2 without a GPU that the kernels are for.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli
from experiments.benchmarking import provenance
from experiments.checking import processes
from experiments.checking.groups import groups
from experiments.checking.judgement import Record

_METHOD = (
    "float64 on the same GPU for all queries or sampled ones; errors are ||o - exact|| / "
    "||exact||; score gaps are relative to the query's largest score"
)


# Least compute capability, and its name.
_GPUS = {"mosaic_gpu": (9.0, "Hopper"), "triton": (8.0, "Ampere, Ada or Hopper")}


def main(argv: Sequence[str]) -> int:
    """Runs the groups, prints a line per case and writes the JSON."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    _check_gpu(values.implementation)
    order: dict[str, Any] = {"quick": values.quick, "million": values.million}
    order["implementation"] = values.implementation
    known = list(groups(**order))
    names = [name for name in known if name.startswith(tuple(values.groups) or "")]
    if not names:
        given = ",".join(values.groups)
        raise cli.UsageError(f"--groups={given}: none begins so of {', '.join(known)}")
    alone = [name for name in names if name.endswith("1M")]
    together = [name for name in names if name not in alone]
    records: list[Record] = []
    for some, jobs in ((together, values.jobs), (alone, 1)):
        for record in processes.run(some, order, jobs=jobs, seconds=values.group_seconds):
            print(line(record), flush=True)
            records.append(record)
    _write(pathlib.Path(values.output), argv[1:], records)
    failed = [record for record in records if not record["passed"]]
    print("\n".join(["", *map(line, failed)]))
    print(f"{len(records) - len(failed)} of {len(records)} checks passed")
    return 1 if failed else 0


def _check_gpu(implementation: str) -> None:
    """Raises UsageError without a GPU that the kernels are for."""
    capability, family = _GPUS[implementation]
    found = provenance.gpu()
    if found is None or not capability <= float(found["compute_cap"]) < 10:
        name = found["name"] if found else "none"
        raise cli.UsageError(
            f"these kernels are checked on an NVIDIA {family} GPU, found {name}: without one, "
            "`python -m pytest tests/pallas_kernels` runs them in an interpreter"
        )


def line(record: Record) -> str:
    """A record in one line: verdict, group, case, and figures with their bars."""
    verdict = "ok  " if record["passed"] else "FAIL"
    figures = record.get("figures", {})
    # A count of zero needs no words.
    shown = [name for name, value in figures.items() if value or record["bars"][name] != 0]
    words = [f"{name} {figures[name]:.2g}{_bar(record['bars'][name])}" for name in shown]
    text = f"{verdict} {record['group']}: {record['case']}: {', '.join(words)}"
    return text + record.get("error", "")


def _bar(bar: float | None) -> str:
    return "" if bar is None else f" (bar {bar:.2g})"


def _write(folder: pathlib.Path, arguments: Sequence[str], records: Sequence[Record]) -> None:
    environment = provenance.environment(
        "experiments.check_kernels", arguments, method=_METHOD, xla_flags=processes.XLA_FLAGS
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "records": list(records)}, indent=1)
    (folder / "checks.json").write_text(text + "\n", encoding="utf-8")


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("output", "runs/checks", "folder of the results", flag_values=values)
    flags.DEFINE_enum(
        "implementation", "mosaic_gpu", list(_GPUS), "which kernels", flag_values=values
    )
    flags.DEFINE_list("groups", [], "how names of groups begin; all", flag_values=values)
    flags.DEFINE_bool("quick", False, "2K tokens alone", flag_values=values)
    flags.DEFINE_bool("million", False, "1M tokens too", flag_values=values)
    flags.DEFINE_integer("jobs", 8, "groups at a time", lower_bound=2, flag_values=values)
    flags.DEFINE_float(
        "group_seconds", 150.0, "after which a group is ended", lower_bound=1, flag_values=values
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
