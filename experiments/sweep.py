"""Runs a sweep: many trainings over config fields, compared in one report.

    python -m experiments.sweep --sweep=configs/sweeps/sparsity.py --workdir=runs/sweeps/sparsity

The same command again goes on where it was. Run beside it, on this or, with `--storage`, on other
machines, it joins the study: workers share the trials, and those of a killed worker are taken up
again from their checkpoints. Ctrl-C or SIGTERM ends it with a checkpoint of every running trial.

    --storage=postgresql://user@host/name    or mysql://, or journal:/shared/disk/study.log
    --config.train.steps=800                 changes a field in every trial

The work directory then holds `trials/NNNN` (a run each, with `log.txt`), `results.csv`, `figures/`
and `report.html`, written again after every trial; `--report` alone writes them and trains nothing.

Needs the extra `sweeps`. Exit code: 0 when all trials have ended, 1 when none of them completed,
2 after a mistake in the command line or sweep file, 128 + the signal's number after a signal.
"""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.sweeping.points import Space, base_arguments, make_space
from msa_jax.train.sweep import Sweep


def main(argv: Sequence[str]) -> int:
    """Works on one study; returns the exit code."""
    program, *rest = argv
    file, rest = cli.take_flag(rest, "sweep")
    if file is None:
        own = [argument for argument in rest if not argument.startswith("--config.")]
        cli.parse([program, *own], _define_flags, usage=__doc__ or "")
        raise cli.UsageError("--sweep is missing: name a file, --sweep=configs/sweeps/sparsity.py")
    if cli.take_flag(rest, "config")[0] is not None:
        raise cli.UsageError(f"--config: the base config is named in {file}; edit it there")
    sweep = _read_sweep(file)
    values, base = cli.parse_with_config(
        [program, *base_arguments(sweep), *rest], _define_flags, usage=__doc__ or ""
    )
    if not values.workdir:
        raise cli.UsageError("--workdir is missing: name a folder, --workdir=runs/sweeps/sparsity")
    if values.trials is not None:
        sweep = dataclasses.replace(sweep, trials=values.trials)
    return _work(make_space(sweep, base), values)


def _work(space: Space, values: flags.FlagValues) -> int:
    if importlib.util.find_spec("optuna") is None:
        raise cli.UsageError("sweeps need Optuna: pip install 'msa-jax[sweeps]'")
    # They import what the extra brings, so they come after the check that it is there.
    from experiments.sweeping.report import write_results
    from experiments.sweeping.storage import open_storage, open_study, study_exists
    from experiments.sweeping.worker import Worker

    workdir = pathlib.Path(values.workdir)
    name = values.study or workdir.resolve().name
    if values.report and not workdir.is_dir():
        raise cli.UsageError(f"--report: there is no folder {str(workdir)!r}")
    workdir.mkdir(parents=True, exist_ok=True)
    storage = open_storage(values.storage, workdir)
    if values.report and not study_exists(storage, name):
        raise cli.UsageError(f"--report: no study {name!r} is stored there; run the sweep first")
    study = open_study(storage, space, name)
    code = 0
    if not values.report:
        worker = Worker(
            study,
            storage,
            space,
            workdir,
            jobs=values.jobs,
            stale_after=values.stale_after,
            on_finished=lambda: write_results(study, space, workdir),
        )
        code = worker.run()
    completed = write_results(study, space, workdir)
    print(f"report: {workdir / 'report.html'}")
    return code or int(completed == 0)


def _read_sweep(file: str) -> Sweep:
    sweep = cli.load_file("sweep", file, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise cli.UsageError(
            f"--sweep={file}: get_sweep() returned a {type(sweep).__name__}; return a Sweep"
        )
    return sweep


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the sweep; required", flag_values=values)
    flags.DEFINE_string(
        "storage", None, "URL of the study; SQLite in the work directory", flag_values=values
    )
    flags.DEFINE_string("study", None, "its name; the work directory's", flag_values=values)
    flags.DEFINE_integer(
        "trials", None, "points in all, instead of the file's", 1, flag_values=values
    )
    flags.DEFINE_integer("jobs", 1, "trainings at a time on this machine", 1, flag_values=values)
    flags.DEFINE_float(
        "stale_after", 120.0, "seconds until a silent worker is lost", 1.0, flag_values=values
    )
    flags.DEFINE_bool("report", False, "write the results, train nothing", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
