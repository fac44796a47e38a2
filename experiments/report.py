"""Writes the report of finished runs: one HTML file that needs no network.

    python -m experiments.report --run=runs/quickstart/msa --run=runs/quickstart/gqa \
        --output=runs/quickstart/report.html

The comparison is relative to the last run named. With --svg_dir the figures are also written as SVG
files of their own.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from configs import msa_109b
from experiments import cli
from msa_jax.config import ArchitectureConfig
from msa_jax.eval.report import write_figures, write_report
from msa_jax.eval.runs import RunFileError
from msa_jax.train.config import ExperimentConfig, from_config_dict


def report(runs: Sequence[str], output: str, svg_dir: str | None = None) -> None:
    """Writes the report of these runs, with the paper's 109B model in the cost table.

    Args:
      runs: folders of finished runs.
      output: the HTML file; its folder is made.
      svg_dir: folder for the figures as files of their own; None writes none.

    Raises:
      UsageError: a file of a run is missing or damaged.
    """
    path, paper = pathlib.Path(output), _paper_model()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_report(runs, path, cost_config=paper, cost_name="the paper's 109B model")
        if svg_dir:
            write_figures(runs, svg_dir, cost_config=paper)
    except RunFileError as error:
        raise cli.UsageError(str(error)) from error


def main(argv: Sequence[str]) -> None:
    """Parses the command line and writes the report."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.run:
        raise cli.UsageError("--run is missing: name a run's folder, once for each run")
    report(values.run, values.output, values.svg_dir)
    print(values.output)


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("run", [], "folder of a finished run", flag_values=values)
    flags.DEFINE_string("output", "report.html", "the HTML file", flag_values=values)
    flags.DEFINE_string("svg_dir", None, "folder for the figures as SVG files", flag_values=values)


def _paper_model() -> ArchitectureConfig:
    return from_config_dict(ExperimentConfig, msa_109b.get_config()).architecture


if __name__ == "__main__":
    sys.exit(cli.run(main))
