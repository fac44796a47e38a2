"""Times block selection and sparse attention on a Hopper GPU against dense and sparse baselines.

A full run is three commands, of some minutes each:

    python -m experiments.benchmark --lengths=8K,32K,128K --output=runs/benchmark/h100
    python -m experiments.benchmark --lengths=1M --baselines= --output=runs/benchmark/h100
    python -m experiments.benchmark --lengths=1M --selections= --baselines=flash_attention_4 \\
        --skip_dense_above=1M --output=runs/benchmark/h100

and one more for training, backward pass and KL included:

    python -m experiments.benchmark --passes=training --lengths=8K,32K,128K \\
        --selections=random,correlated --precisions=native --output=runs/benchmark/h100

Records are appended to OUTPUT.jsonl as they come, and OUTPUT.json, .md and .svg are written at the
end of each command, from all records in it. Every case runs in a process of its own and says on
standard error what takes it how long. Baselines: cuDNN through jax, and FlashAttention-4 and
flash-msa where they are installed. Files are rendered together by --render, once per file, which
needs no GPU:

    python -m experiments.benchmark --render=runs/benchmark/h100.jsonl --output=docs/benchmarks/h100
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.benchmarking import provenance, report, results, runner, timing
from experiments.benchmarking.cases import (
    BASELINES,
    FORWARD,
    PASSES,
    PRECISIONS,
    SELECTIONS,
    parse_length,
    plan,
)

_DEFAULT_LENGTHS = "8K,32K,128K,1M"
_SHAPE = {
    "batch": ("batch", 1),
    "heads": ("num_heads", 64),
    "kv_heads": ("num_kv_heads", 4),
    "head_dim": ("head_dim", 128),
    "index_dim": ("index_dim", 128),
    "block_size": ("block_size", 128),
    "top_k": ("top_k", 16),
    "seed": ("seed", 0),
    "repeats": ("repeats", 5),
    "sampled_rows": ("sampled_rows", 32),
}


def main(argv: Sequence[str]) -> int:
    """Times what the flags name, or renders what was timed; 1 if a case failed."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    output = pathlib.Path(values.output)
    try:
        if not values.render:
            _time(values, output, argv[1:])
        files = values.render or [output.with_suffix(".jsonl")]
        runs = results.load([pathlib.Path(file) for file in files])
        report.write(runs, output)
        report.show(runs)
    except results.ResultError as error:
        raise cli.UsageError(str(error)) from error
    return 1 if results.failures(runs) else 0


def _time(values: flags.FlagValues, output: pathlib.Path, arguments: Sequence[str]) -> None:
    found = provenance.gpu()
    if found is None or not found["compute_cap"].startswith("9."):
        name = found["name"] if found else "none"
        raise cli.UsageError(
            f"the benchmark needs an NVIDIA Hopper GPU, found {name}: "
            "`python -m experiments.benchmark_reference` times the plain-XLA operations on a CPU"
        )
    (passes,) = _choices("passes", [values.passes], PASSES)
    cases = plan(
        [parse_length(text) for text in values.lengths],
        _choices("selections", values.selections, SELECTIONS),
        _choices("precisions", values.precisions, PRECISIONS),
        _choices("baselines", values.baselines, tuple(BASELINES)),
        skip_dense_above=parse_length(values.skip_dense_above),
        inputs=values.inputs,
        passes=passes,
        # Training says in its records what each op runs as; the forward pass refuses a fallback.
        implementation="mosaic_gpu" if passes == FORWARD else "",
        **{field: values[name].value for name, (field, _) in _SHAPE.items()},
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    runner.run(
        cases,
        output.with_suffix(".jsonl"),
        provenance.environment(
            "experiments.benchmark",
            arguments,
            method=timing.METHOD,
            xla_flags=runner.XLA_FLAGS,
        ),
        case_seconds=values.case_seconds,
        total_seconds=values.total_seconds,
        report=lambda line: print(line, flush=True),
    )


def _choices(flag: str, values: Sequence[str], choices: Sequence[str]) -> Sequence[str]:
    for value in values:
        if value not in choices:
            raise cli.UsageError(f"--{flag}={value}: choose from {', '.join(choices)}")
    return values


def _define_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str, words: str) -> None:
        flags.DEFINE_string(name, default, words, flag_values=values)

    def several(name: str, default: str, words: str) -> None:
        flags.DEFINE_list(name, default, words, flag_values=values)

    several("lengths", _DEFAULT_LENGTHS, "tokens, as 8192, 8K or 1M")
    several(
        "selections", "random,identical,correlated", f"of {', '.join(SELECTIONS)}; may be empty"
    )
    several("precisions", ",".join(PRECISIONS), "of the index: native (bf16), int8")
    several("baselines", ",".join(BASELINES), f"of {', '.join(BASELINES)}; may be empty")
    text("skip_dense_above", "256K", "longest length at which dense baselines are timed")
    text("passes", FORWARD, f"one of {', '.join(PASSES)}")
    text("inputs", "", "npz file of experiments.capture_inputs, for the captured selection")
    text("output", "runs/benchmark/results", "path of the results without a suffix")
    flags.DEFINE_multi_string("render", [], "results to render instead", flag_values=values)
    for name, (field, default) in _SHAPE.items():
        flags.DEFINE_integer(name, default, field.replace("_", " "), 0, flag_values=values)
    for name, default, words in (
        ("case_seconds", 240.0, "after which one case is ended, flash-msa two minutes later"),
        ("total_seconds", 36000.0, "after which no further case is begun"),
    ):
        flags.DEFINE_float(name, default, words, lower_bound=1, flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
