"""The page of all TPU kernels: what is compiled for it, and how it is written."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.benchmarking.cases import parse_length
from experiments.compiling.hlo import plain_name
from experiments.compiling.machines import MACHINES
from experiments.compiling.programs import Options, Shape
from experiments.compiling.record_text import floor_ms, operation_ms
from msa_jax.eval.figures import short_length

Record = dict[str, Any]

# What the page has, with what it is called there.
OPERATIONS = {
    "select_blocks": "selection",
    "sparse_attention": "forward",
    "sparse_attention_gradient": "backward",
    "index_kl_gradient": "KL and its gradient",
}
_IMPLEMENTATION = "mosaic_tpu"

_INTRODUCTION = """# TPU kernels, by their schedules

**No TPU has run any of this.** All kernels were compiled on a machine without one, by libtpu, which
is the whole compiler: what does not fit or does not lower fails there as it would on the chip. The
times below follow from the compiler's own schedules. They know nothing of waiting for a copy, of
stalls that only the hardware sees, of clocks that drop, or of launches.

Written by `{command}` with jax {jax} and libtpu {libtpu}, commit {commit}, {date}. All figures,
also those of every loop, are in [tpu-static.json](tpu-static.json).
`python -m experiments.compile_check --target=tpu-v5p --op=select_blocks --shape=128K` prints one of
them, loop by loop.

One sequence, 64 query heads and 4 KV heads of 128 dims, blocks of 128 tokens, 16 of them per query
and group, bf16; one jax device, which is two cores on v5p and one on the others.

## How the figures come about

* **ms**: each loop's bundles, of which a core issues one per cycle, or the cycles for which its
  matrix products occupy the busiest MXU if those are more; times how often the loop runs, over the
  clock. Or the bytes that the kernel copies over the chip's bandwidth (**copies**), whichever takes
  longer.
* **Clock**: derived from the published peak and what an MXU multiplies per cycle: {clocks} GHz.
* **How often loops run**: constants of the schedule; where the data decide, the mean of a causal
  sequence whose selections overlap by U(R) = 16 + 2.03 (R - 1) distinct blocks for R neighbouring
  queries. `experiments/compiling/trips.py` has the counts. Branches that it does not name count as
  always taken.
* **Floors**: the useful work as in [Benchmarks on an H100](h100.md), over the published peak and
  bandwidth; **ratio** is the time over the larger one. Products over 128 dims leave half of the
  256-wide MXUs of v6e and v7x idle, so that no kernel there can come below twice its MXU floor.
* **Around**: XLA's own estimate, in ms, of the operations outside kernels (layouts, lists, sorts).
  It is not in the time.
* **MXU**, **VALU**: of the time's cycles, those in which an MXU is occupied; slots of the vector
  units that are filled. A kernel is bound by the busiest unit, if one is busy for 60 % of the
  time, and else by latency: by what has to wait for what.
* **Spills**: registers stored to memory and loaded from there, in one pass over the code.
"""


def orders(lengths: Sequence[str]) -> list[Record]:
    """Every operation for every chip and length, for the worker.

    Raises:
      ConfigError: a length that is no number of tokens.
    """
    options = dataclasses.asdict(Options(implementation=_IMPLEMENTATION))
    return [
        {
            "target": f"tpu-{chip}",
            "op": op,
            "shape": dataclasses.asdict(Shape(parse_length(length))),
            "options": options,
        }
        for op in OPERATIONS
        for length in lengths
        for chip in MACHINES
    ]


def progress(record: Record) -> str:
    """A line for standard error."""
    place = f"{record['op']}, {short_length(record['shape']['length'])}, {record['target']}"
    return f"{place}: {record.get('error') or str(record['seconds']) + ' s'}"


def render(records: Sequence[Record], environment: Record) -> str:
    """The page in Markdown.

    Args:
      records: answers to `orders`.
      environment: command, versions, commit and date.
    """
    clocks = ", ".join(f"{m.chip.name} {m.clock_hz / 1e9:.2f}" for m in MACHINES.values())
    fields = {name: environment[name] for name in ("command", "commit", "date")}
    parts = [_INTRODUCTION.format(clocks=clocks, **fields, **environment["packages"])]
    for op, title in OPERATIONS.items():
        mine = [record for record in records if record["op"] == op]
        if mine:
            parts += [f"\n## {title[0].upper() + title[1:]}\n", _operations(mine), _kernels(mine)]
    return "\n".join(parts) + "\n"


def _operations(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        if "error" in record:
            rows.append([*_place(record), record["error"].replace("|", "/")[:160], *["-"] * 6])
            continue
        time, floor = operation_ms(record), floor_ms(record)
        ratio = time / floor if time and floor else None
        floors = record.get("floor_mxu_ms"), record.get("floor_hbm_ms")
        gigabytes = record["memory"]["temporaries"] / 1e9
        cells = [time, *floors, ratio, record["around_ms"]]
        fits = "yes" if record["fits"] else "no"
        rows.append([*_place(record), *map(_number, cells), f"{gigabytes:.2f}", fits])
    header = ["tokens", "chip", "ms", "MXU floor", "HBM floor", "ratio", "around", "temporary GB"]
    return _table([*header, "fits"], rows)


def _kernels(records: Sequence[Record]) -> str:
    rows = [
        [*_place(record), *_kernel(kernel)]
        for record in records
        for kernel in record.get("kernels", ())
    ]
    header = ["tokens", "chip", "kernel", "runs", "ms", "copies ms", "bound by"]
    return _table([*header, "MXU %", "VALU %", "VMEM MiB", "spills"], rows) if rows else ""


def _kernel(kernel: Record) -> Iterator[str]:
    yield f"`{plain_name(kernel['name'])}`"
    yield "?" if kernel["runs"] is None else str(kernel["runs"])
    if "ms" in kernel:
        yield from (_number(kernel["ms"]), _number(kernel["copy_ms"]), kernel["bound"])
        yield from (f"{100 * kernel['occupancy'][unit]:.0f}" for unit in ("MXU", "VALU"))
    else:
        yield from ("-", "-", kernel.get("untimed", "-"), "-", "-")
    if "sections" in kernel:
        yield f"{kernel['vmem_bytes'] / 2**20:.1f}"
        yield str(sum(section["spills"] for section in kernel["sections"]))
    else:
        yield from ("-", "-")


def _place(record: Record) -> list[str]:
    return [short_length(record["shape"]["length"]), record["target"].removeprefix("tpu-")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
