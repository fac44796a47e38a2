"""What a model's context costs: MSA against its dense twin, in compute, memory and US dollars.

    python -m experiments.economics --config=configs/msa_109b.py --output=runs/economics
    python -m experiments.economics --config=configs/msa_109b.py --gpu=h200 --price=3.2 --batch=64

Attention takes what its kernels were measured to take (--benchmark, results of
`experiments.benchmark`), scaled to the model's heads and dims. Prints tables and break-even
lengths, and writes economics.html, .svg, .csv and .json. Beyond the measured lengths values carry a
star; for a GPU that nothing was measured on all are estimates, and say so.

    python -m experiments.economics --shapes --output=docs

holds several models against the usual published estimate instead: economics.md in place of the HTML
page.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from configs import h100_350m, minimax_m3, msa_109b, pilot_10b
from experiments import cli
from experiments.benchmarking.cases import DENSE, SELECTIONS, parse_length
from experiments.benchmarking.results import ResultError
from experiments.costing import (
    comparison,
    comparison_page,
    costs,
    files,
    measurements,
    page,
    shapes,
    words,
)
from msa_jax.config import ArchitectureConfig
from msa_jax.economics import GPUS
from msa_jax.train.config import ExperimentConfig, from_config_dict

_RUNS = (h100_350m, pilot_10b, msa_109b, minimax_m3)
_PAPER = "msa_109b"
_PROFILES = pathlib.Path("docs/benchmarks")


def main(argv: Sequence[str]) -> None:
    """Parses the command line, prints the tables and writes the files."""
    usage = __doc__ or ""
    command = shlex.join(["python", "-m", "experiments.economics", *argv[1:]])
    try:
        if "--shapes" in argv:
            values = cli.parse(argv, _define_flags, usage=usage)
            made = _shapes(values, command)
        else:
            values, config = cli.parse_with_config(argv, _define_flags, usage=usage)
            made = _model(values, config.architecture, command)
    except ResultError as error:
        raise cli.UsageError(str(error)) from error
    for path in files.write(pathlib.Path(values.output), made):
        print(path)


def _model(values: flags.FlagValues, config: ArchitectureConfig, command: str) -> dict[str, str]:
    """Prints one model's tables; returns its files."""
    setting = _setting(values)
    rows = costs.cost_rows(config, _lengths(values), setting)
    evens = costs.break_evens(config, setting)
    tables = {
        "Memory": words.memory_table(rows, setting),
        "Attention's share": words.share_table(rows),
        words.dollars(setting): words.dollar_table(rows),
    }
    notes = words.caveat(config, setting) + words.assumptions(setting)
    files.show(words.title(config, setting), tables, [even.sentence for even in evens] + notes)
    return page.files(config, rows, evens, setting, command)


def _shapes(values: flags.FlagValues, command: str) -> dict[str, str]:
    """Prints the comparison of several models; returns its files."""
    setting = _setting(values)
    runs = {m.__name__: from_config_dict(ExperimentConfig, m.get_config()) for m in _RUNS}
    configs = {name.split(".")[-1]: run.architecture for name, run in runs.items()}
    configs |= shapes.LLAMA_3
    # That run was on an H100, and its dense attention cuDNN's.
    ran = _setting(values, gpu="h100", dense="cudnn")
    check = comparison.measured_steps(_PROFILES, runs[h100_350m.__name__], ran)
    found = comparison.models(configs, setting)
    # Where neighbouring queries share least.
    worst = comparison.models(configs, _setting(values, selection="random"))
    tables = {
        "By FLOPs": comparison.by_flops(found),
        f"By prefill time{words.estimated(setting)}": comparison.by_time(found),
        f"MSA is cheaper from (tokens{words.estimated(setting)})": comparison.break_even_table(
            found, worst
        ),
        "Check": check,
    }
    files.show("The usual estimate against several models", tables, words.assumptions(setting))
    return comparison_page.files(found, worst, _PAPER, _lengths(values), setting, check, command)


def _setting(
    values: flags.FlagValues, gpu: str = "", selection: str = "", dense: str = ""
) -> costs.Setting:
    """What the flags say, but for what is given."""
    return costs.setting(
        pathlib.Path(values.benchmark),
        gpu or values.gpu,
        price=values.price,
        selection=selection or values.selection,
        dense=dense or values.dense,
        matmul_fraction=values.matmul_fraction,
        batch=values.batch,
    )


def _lengths(values: flags.FlagValues) -> list[int]:
    return sorted({parse_length(text) for text in values.lengths})


def _define_flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    dense = (measurements.FASTEST, *DENSE)
    flags.DEFINE_bool("shapes", False, "compares several models; without --config", **own)
    flags.DEFINE_enum("gpu", "h100", list(GPUS), f"one of {', '.join(GPUS)}", **own)
    flags.DEFINE_float("price", None, "US dollars per GPU hour; else assumed", 0, **own)
    flags.DEFINE_string(
        "benchmark", "docs/benchmarks/h100.json", "results of experiments.benchmark", **own
    )
    flags.DEFINE_list("lengths", "8K,16K,32K,64K,128K,256K,512K,1M", "tokens of context", **own)
    flags.DEFINE_enum("selection", "correlated", SELECTIONS, "of the benchmark", **own)
    flags.DEFINE_enum("dense", dense[0], dense, f"kernel: {', '.join(dense)}", **own)
    flags.DEFINE_float(
        "matmul_fraction",
        measurements.MATMUL_FRACTION,
        "of the peak, that the products outside of attention reach",
        **own,
    )
    flags.DEFINE_integer("batch", 32, "sequences that decode together", 1, **own)
    flags.DEFINE_string("output", "runs/economics", "folder of the files", **own)


if __name__ == "__main__":
    sys.exit(cli.run(main))
