"""Puts finished runs of several models side by side: one table, one row for each.

    python -m experiments.compare --run=runs/comparison/msa_0 --run=runs/comparison/msa_1 \
        --run=runs/comparison/gqa_0 --run=runs/comparison/gqa_1 \
        --results='runs/comparison/long_context/*.json' --output=runs/comparison/page

Runs that differ in seeds alone are one row, with their mean and spread. `--results` adds what
`experiments.evaluate` measured of them; its files are named as the runs' folders are. The output
is `comparison.md` (tables), `comparison.json` (the numbers in them) and figures.
"""

import dataclasses
import glob
import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from msa_jax.eval import figures
from msa_jax.eval.comparison import comparison_figures, length_tables, main_table
from msa_jax.eval.contenders import Contender, read_contenders
from msa_jax.eval.runs import RunFileError
from msa_jax.eval.tables import markdown


def main(argv: Sequence[str]) -> None:
    """Reads the runs, writes the files, prints the tables."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.run:
        raise cli.UsageError("--run is missing: name a run's folder, once for each run")
    results = [path for pattern in values.results for path in _matching(pattern)]
    try:
        contenders = read_contenders(values.run, results)
    except RunFileError as error:
        raise cli.UsageError(str(error)) from error
    print(write(contenders, values.reference, pathlib.Path(values.output)))


def write(contenders: Sequence[Contender], reference: str, folder: pathlib.Path) -> str:
    """Writes all files into a folder, which is made; returns the tables.

    Raises:
      ConfigError: `reference` is the label of no contender.
    """
    tables = [main_table(contenders, reference), *length_tables(contenders)]
    text = "\n\n".join(map(markdown, tables)) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    record = [dataclasses.asdict(one) for one in contenders]
    (folder / "comparison.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, figure in comparison_figures(contenders).items():
        svg = figures.standalone(figure.svg)
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return text


def _matching(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise cli.UsageError(f"--results={pattern}: matches no file")
    return paths


def _define_flags(values: flags.FlagValues) -> None:
    add = {"flag_values": values}
    flags.DEFINE_multi_string("run", [], "folder of a finished run", **add)
    flags.DEFINE_multi_string("results", [], "glob of results of experiments.evaluate", **add)
    flags.DEFINE_string("reference", "GQA", "what losses are relative to, as labelled", **add)
    flags.DEFINE_string("output", "comparison", "folder of the files", **add)


if __name__ == "__main__":
    sys.exit(cli.run(main))
