"""Evaluates finished runs on long contexts: perplexity, needles, RULER's tasks, recall, selection.

    python -m experiments.evaluate --checkpoint=runs/quickstart/msa --lengths=256,512,1K

The run's config and its last checkpoint come from its folder. Results go to a JSON file in
`--output` when each task and length is done; started again, the command measures only what is not
there yet. Several runs, each a `--checkpoint`, share one page. `docs/evaluation.md` says what the
scores mean.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import rich.console
import rich.table
from absl import flags

from experiments import cli
from experiments.benchmarking.cases import parse_length
from msa_jax.config import ConfigError, require_choice
from msa_jax.eval.long_context import Cell, HaystackText, LongContextConfig, ResultsFile, Task
from msa_jax.eval.long_context_page import describe, summary_table, write_page
from msa_jax.eval.long_context_run import evaluate, open_results
from msa_jax.eval.subject import load_subject


def main(argv: Sequence[str]) -> None:
    """Evaluates every run, prints its table, writes the page."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    if not values.checkpoint:
        raise cli.UsageError("--checkpoint is missing: name the folder of a finished run")
    labels = [pathlib.Path(workdir).resolve().name for workdir in values.checkpoint]
    if len(set(labels)) < len(labels):
        raise cli.UsageError(
            f"--checkpoint: the folders' names {', '.join(labels)} must differ, they name the runs"
        )
    settings = _settings(values)
    output = pathlib.Path(values.output or pathlib.Path(values.checkpoint[0]) / "long_context")
    runs = {}
    for label, workdir in zip(labels, values.checkpoint, strict=True):
        subject = load_subject(workdir, settings, step=values.step)
        runs[label] = open_results(subject, output / f"{label}.json")
        evaluate(subject, runs[label], on_cell=_teller(label))
        _print_table(label, runs[label])
    print(f"page: {write_page(runs, output)}")


def _settings(values: flags.FlagValues) -> LongContextConfig:
    for task in values.tasks:
        require_choice("--tasks", task, Task)
    return LongContextConfig(
        tasks=tuple(values.tasks),
        lengths=tuple(_tokens("lengths", text) for text in values.lengths),
        texts=tuple(values.text),
        tokens=_tokens("tokens", values.tokens),
        examples=values.examples,
        depths=values.depths,
        pairs=tuple(_tokens("pairs", text) for text in values.pairs),
        haystack=values.haystack,
        batch_tokens=_tokens("batch_tokens", values.batch_tokens),
        seed=values.seed,
    )


def _tokens(flag: str, text: str) -> int:
    try:
        return parse_length(text.strip())
    except ConfigError as error:
        raise cli.UsageError(f"--{flag}: {error}") from error


def _teller(label: str):
    def tell(cell: Cell, values: Mapping[str, Any] | str) -> None:
        name = " ".join(part for part in (cell.task, cell.variant) if part)
        said = f"left out: {values}" if isinstance(values, str) else describe(cell, values)
        print(f"{label}: {name}, {cell.length:,} tokens: {said}", file=sys.stderr)

    return tell


def _print_table(label: str, results: ResultsFile) -> None:
    head, rows = summary_table(results)
    table = rich.table.Table(title=label)
    for place, column in enumerate(head):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


def _define_flags(values: flags.FlagValues) -> None:
    default, add = LongContextConfig(), {"flag_values": values}
    flags.DEFINE_multi_string("checkpoint", [], "folder of a finished run; required", **add)
    flags.DEFINE_integer("step", None, "which checkpoint, the last by default", **add)
    flags.DEFINE_list("tasks", list(default.tasks), "what to measure", **add)
    flags.DEFINE_list("lengths", ["2K", "4K", "8K"], "tokens of context", **add)
    flags.DEFINE_multi_string("text", [], "glob of files, a text of its own", **add)
    flags.DEFINE_string("output", None, "folder; RUN/long_context of the first run", **add)
    flags.DEFINE_string("tokens", "64K", "tokens of each text, at every length", **add)
    flags.DEFINE_integer("examples", default.examples, "prompts per task and length", **add)
    flags.DEFINE_integer("depths", default.depths, "needle positions", **add)
    flags.DEFINE_list("pairs", list(map(str, default.pairs)), "pairs of associative recall", **add)
    flags.DEFINE_enum("haystack", "filler", get_args(HaystackText), "what hides needles", **add)
    flags.DEFINE_string("batch_tokens", "16K", "tokens of a batch", **add)
    flags.DEFINE_integer("seed", default.seed, "of the examples", **add)


if __name__ == "__main__":
    sys.exit(cli.run(main))
