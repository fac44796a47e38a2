"""Trains a small MSA model and its dense twin on real text, evaluates both, compares and reports.

    make quickstart

or, with any field of the config changed,

    python -m experiments.quickstart --config.attention.top_k=4 --workdir=runs/top_4

The twin is the same config with `attention.kind="gqa"`: same data in the same order. The folder
holds a run of each, `report.html` and its figures. Started again it goes on where it was.
"""

import pathlib
import sys
import time
from collections.abc import Sequence

import rich.console
import rich.table
from absl import flags

from experiments import cli
from experiments.report import report
from experiments.train import run_experiment
from msa_jax.config import dense_twin
from msa_jax.eval.report import comparison_table
from msa_jax.eval.runs import read_runs

_DEFAULT_CONFIG = "--config=configs/quickstart.py"


def main(argv: Sequence[str]) -> int:
    """Runs both trainings, prints the comparison, writes the report; returns the exit code."""
    started = time.monotonic()
    program, *rest = argv
    values, config = cli.parse_with_config(
        [program, _DEFAULT_CONFIG, *rest], _define_flags, usage=__doc__ or ""
    )
    if config.attention.kind != "msa":
        raise cli.UsageError('attention.kind must be "msa": the dense twin is made from it')
    folder = pathlib.Path(values.workdir)
    for name, run_config in {"msa": config, "gqa": dense_twin(config)}.items():
        code = run_experiment(run_config, folder / name)
        if code:
            return code
    runs = [folder / "msa", folder / "gqa"]
    page = folder / "report.html"
    report(list(map(str, runs)), str(page), svg_dir=str(folder / "figures"))
    _print_comparison(runs)
    print(f"report: {page} ({time.monotonic() - started:.0f} s in all)")
    return 0


def _print_comparison(runs: Sequence[pathlib.Path]) -> None:
    head, rows = comparison_table(read_runs(runs))
    table = rich.table.Table(title="MSA and its dense twin")
    for place, column in enumerate(head):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "runs/quickstart", "folder for the runs", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
