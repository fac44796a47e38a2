"""Compiles an operation or a training step for a TPU or an H100 on a machine without one.

    python -m experiments.compile_check --target=tpu-v5p --op=select_blocks --shape=128K
    python -m experiments.compile_check --target=h100 --op=sparse_attention \\
        --shape=32K,batch=2,num_heads=32
    python -m experiments.compile_check --target=tpu-v5p:2x2x2 --config=configs/pilot_10b.py \\
        --config.data.batch_size=64
    python -m experiments.compile_check --report --output=docs/benchmarks

Says what memory it takes and whether that fits, the FLOPs and bytes that XLA counts, and which
kernels are in it. Of a TPU's kernels it reads the compiler's own schedule: bundles, what of every
unit they use, spills, and the time that this implies at the chip's clock, beside the floor of the
useful work. Of an H100's, what the assembler says: registers and spills. Nothing runs on either.

A --shape is a number of tokens and fields of `experiments.compiling.programs.Shape`: length,
queries, batch, num_heads, num_kv_heads, head_dim, index_dim, block_size, top_k. With --config,
every field of the config can be set as in `experiments.train`. --report compiles all TPU kernels
for all chips and writes OUTPUT/tpu-static.md and .json.

Exit code: 0 if all of it compiled and fits, 1 if not, 2 after a mistake in the command line.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli
from experiments.benchmarking import provenance
from experiments.compiling import page, processes
from experiments.compiling.programs import OPERATIONS, Options, parse_shape
from experiments.compiling.record_text import record_text
from experiments.compiling.targets import parse_target

_METHOD = "compiled by libtpu on a machine without a TPU; times follow from schedules, none has run"


def main(argv: Sequence[str]) -> int:
    """Compiles what the flags name and prints what came out."""
    values, config = _parse(argv)
    if values.report:
        return _report(values, argv[1:])
    if bool(values.op) == bool(config):
        raise cli.UsageError("name either an operation, --op=select_blocks, or a --config")
    place = parse_target(values.target)
    order: dict[str, Any] = {"target": place.name}
    if config:
        order |= {"config": config, "phase": values.phase}
    elif place.topology:
        raise cli.UsageError(f"--target={place.name}: an --op is compiled for one device")
    else:
        order |= {"op": values.op, "shape": dataclasses.asdict(parse_shape(values.shape))}
        order["options"] = dataclasses.asdict(_options(values))
    (record,) = processes.run([order], workers=1)
    print(record_text(record))
    if values.json:
        _write(pathlib.Path(values.json), argv[1:], [record])
    return int("error" in record or not record["fits"])


def _parse(argv: Sequence[str]) -> tuple[flags.FlagValues, dict[str, Any] | None]:
    """The flags, and the config's fields if there is one."""
    usage = __doc__ or ""
    if not any(argument.lstrip("-").startswith("config") for argument in argv[1:]):
        return cli.parse(argv, _define_flags, usage=usage), None
    values, config = cli.parse_with_config(argv, _define_flags, usage=usage)
    return values, dataclasses.asdict(config)


def _options(values: flags.FlagValues) -> Options:
    return Options(values.dtype, values.implementation, values.index_precision)


def _report(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Compiles every kernel for every chip and length, and writes the page."""
    orders = page.orders(values.lengths)
    records = []
    for record in processes.run(orders, workers=values.workers):
        print(page.progress(record), file=sys.stderr, flush=True)
        records.append(record)
    folder = pathlib.Path(values.output)
    environment = _write(folder / "tpu-static.json", arguments, records)
    (folder / "tpu-static.md").write_text(page.render(records, environment), encoding="utf-8")
    return int(any("error" in record for record in records))


def _write(path: pathlib.Path, arguments: Sequence[str], records: Sequence[Any]) -> dict[str, Any]:
    """Writes the records and what they depend on, which is returned."""
    environment = provenance.environment(
        "experiments.compile_check", arguments, method=_METHOD, xla_flags=None
    )
    environment["packages"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "records": list(records)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return environment


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", "tpu-v5p", "chip, or chip:topology", flag_values=values)
    flags.DEFINE_enum("op", "", ["", *OPERATIONS], "operation", flag_values=values)
    flags.DEFINE_string("shape", "128K", "tokens, and fields", flag_values=values)
    flags.DEFINE_string("dtype", "bfloat16", "of queries, keys and values", flag_values=values)
    flags.DEFINE_string("implementation", "", "its name; the best there is", flag_values=values)
    flags.DEFINE_enum(
        "index_precision", "native", ["native", "int8"], "of the selection", flag_values=values
    )
    flags.DEFINE_enum(
        "phase", "sparse", ["sparse", "warmup"], "of the training step", flag_values=values
    )
    flags.DEFINE_string("json", "", "file for all figures", flag_values=values)
    flags.DEFINE_bool("report", False, "writes the page of all kernels", flag_values=values)
    flags.DEFINE_list("lengths", "32K,128K,1M", "tokens, for --report", flag_values=values)
    flags.DEFINE_string("output", "docs/benchmarks", "folder of the page", flag_values=values)
    flags.DEFINE_integer("workers", 2, "processes", lower_bound=1, flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
