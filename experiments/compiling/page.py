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
from msa_jax.eval.tables import markdown

Record = dict[str, Any]

# What the page has, with what it is called there.
OPERATIONS = {
    "select_blocks": "selection",
    "sparse_attention": "forward",
    "sparse_attention_gradient": "backward",
    "index_kl_gradient": "KL and its gradient",
}
_IMPLEMENTATION = "mosaic_tpu"
# The chip for which operations are compiled as a whole.
_WHOLE = "v5p"

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
and group, bf16; one jax device, which is two cores on v5p and one on the others. The arrays of a
million tokens fit into the memory of few devices: their times are those of one that had it, and
those of several devices that share the queries are as many times shorter.

## How the figures come about

* **ms**: each loop's bundles, of which a core issues one per cycle, or the cycles for which its
  matrix products occupy the busiest MXU if those are more; times how often the loop runs, over the
  clock. Or the bytes that the kernel copies over the chip's bandwidth (**copies**), whichever takes
  longer.
* **Clock**: derived from the published peak and what an MXU multiplies per cycle: {clocks} GHz.
* **How often loops run**: constants of the schedule; where the data decide, the mean of a causal
  sequence whose selections overlap by U(R) = 16 + 2.03 (R - 1) distinct blocks for R neighbouring
  queries. `experiments/compiling/trips.py` has the counts, and a test compares them with the
  schedules. Branches that it does not name count as always taken.
* **MXU floor**, **HBM floor**: the useful work as in [Benchmarks on an H100](h100.md), over the
  published peak and bandwidth; **ratio** is the time over the larger one. Products over 128 dims
  leave half of the 256-wide MXUs of v6e and v7x idle, so that no kernel there can come below twice
  its MXU floor.
* **Tiles' floor**: the matrix products of what a kernel goes through, over the published peak: a
  tile of R queries multiplies each of its U(R) blocks with all of its rows, though a query picked
  16 of them; **times** is the kernel's time over it.
* **MXU**, **VALU**: of the time's cycles, those in which an MXU is occupied; slots of the vector
  units that are filled. A kernel is bound by the busiest unit, if one is busy for 60 % of the
  time, and else by latency: by what has to wait for what.
* **Spills**: registers stored to memory and loaded from there, in one pass over the code.
"""

# What bounds each operation, in words that hold for all chips.
_NOTES = {
    "select_blocks": """The products of index queries and keys occupy the MXUs for most of the time.
What is left is the exact top-k, which does not run beside them; its share falls with the length.
""",
    "sparse_attention": """The MXU floor is that of the 16 blocks of each query alone. A query with
its 16 heads is 16 rows, too few to pay for fetching a block and loading it into an MXU, so that a
tile of neighbours goes through the union of their blocks and masks what a query has not picked: the
tiles' floor. Larger tiles have fewer bytes and more of these products. Above that floor there are
the softmax, part of which the products wait for, and some 200 bundles per step that start and await
its copies, under which nothing is multiplied. Copies come close to the time but on v7x.
""",
    "sparse_attention_gradient": """As the forward pass: tiles go through the union of their blocks
for the gradient of queries, and each block through the tiles that need it for those of keys and
values. Both fetch all that they multiply, so that copies take nearly as long as products; on v5e,
whose bandwidth is the least beside its MXUs, they take longer for the gradient of queries.
""",
    "index_kl_gradient": """The MXU floor has the index scores and their gradients alone. What takes
the time is the teacher: each of the three kernels multiplies all heads' main queries with the main
keys anew, rather than to store their probabilities; the tiles' floor has that. An exponential per
head and key follows, and a sum over heads. All go through the scores of 128 keys at a time, which
fill a quarter of a 256-wide MXU: on v6e and v7x no less than four times the tiles' floor. The
gradient of index keys also transposes, and spreads statistics over lanes, on the XLU.
""",
}

_OUTSIDE = """
## Outside the kernels

XLA's own estimate of the time of the operations around the kernels (layouts, lists, sorts), which
is in none of the times above, and the memory of the whole operation.
"""


def orders(lengths: Sequence[str]) -> list[Record]:
    """Every operation's kernels for every chip and length, for the worker; then some as a whole.

    What XLA makes of the rest of an operation takes minutes to compile: once, for the first length.

    Raises:
      ConfigError: a length that is no number of tokens.
    """
    options = dataclasses.asdict(Options(implementation=_IMPLEMENTATION))
    shapes = [dataclasses.asdict(Shape(parse_length(length))) for length in lengths]

    def order(op: str, shape: Record, chip: str) -> Record:
        return {"target": f"tpu-{chip}", "op": op, "shape": shape, "options": options}

    alone = [
        order(op, shape, chip) | {"kernels_only": True}
        for op in OPERATIONS
        for shape in shapes
        for chip in MACHINES
    ]
    return alone + [order(op, shapes[0], _WHOLE) for op in OPERATIONS]


def progress(record: Record) -> str:
    """A line for standard error."""
    place = f"{record['op']}, {short_length(record['shape']['length'])}, {record['target']}"
    place += "" if record.get("kernels_only") else ", as a whole"
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
        mine = [record for record in records if record["op"] == op and record.get("kernels_only")]
        parts += [f"\n## {title[0].upper() + title[1:]}\n", _NOTES[op]]
        parts += [_operations(mine), _kernels(mine)]
    whole = [record for record in records if not record.get("kernels_only")]
    return "\n".join([*parts, _OUTSIDE, _whole(whole)])


def _operations(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        if "error" in record:
            rows.append([*_place(record), _message(record), *["-"] * 3])
            continue
        time, floor = operation_ms(record), floor_ms(record)
        ratio = time / floor if time and floor else None
        cells = [time, record.get("floor_mxu_ms"), record.get("floor_hbm_ms"), ratio]
        rows.append([*_place(record), *map(_number, cells)])
    head = ["tokens", "chip", "ms", "MXU floor", "HBM floor", "ratio"]
    return markdown((head, rows), names=2) + "\n"


def _kernels(records: Sequence[Record]) -> str:
    rows = [
        [*_place(record), *_kernel(kernel)]
        for record in records
        for kernel in record.get("kernels", ())
    ]
    head = ["tokens", "chip", "kernel", "ms", "copies ms", "tiles' floor", "times", "bound by"]
    head += ["MXU %", "VALU %", "VMEM MiB", "spills"]
    return markdown((head, rows), names=2) + "\n" if rows else ""


def _kernel(kernel: Record) -> Iterator[str]:
    yield f"`{plain_name(kernel['name'])}`"
    if "ms" in kernel:
        floor = kernel.get("floor_tiles_ms")
        yield from map(_number, (kernel["ms"], kernel["copy_ms"], floor))
        yield _number(kernel["ms"] / floor if floor else None)
        yield kernel["bound"]
        yield from (f"{100 * kernel['occupancy'][unit]:.0f}" for unit in ("MXU", "VALU"))
    else:
        yield from (*["-"] * 4, kernel.get("untimed", "-"), "-", "-")
    if "sections" in kernel:
        yield f"{kernel['vmem_bytes'] / 2**20:.1f}"
        yield str(sum(section["spills"] for section in kernel["sections"]))
    else:
        yield from ("-", "-")


def _whole(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        row = [*_place(record), OPERATIONS[record["op"]]]
        if "error" in record:
            rows.append([*row, _message(record), "-", "-"])
            continue
        gigabytes = record["memory"]["temporaries"] / 1e9
        fits = "yes" if record["fits"] else "no"
        rows.append([*row, _number(record["around_ms"]), f"{gigabytes:.2f}", fits])
    head = ["tokens", "chip", "operation", "outside ms", "temporary GB", "fits"]
    return markdown((head, rows), names=2) + "\n"


def _message(record: Record) -> str:
    return record["error"].replace("|", "/")[:160]


def _place(record: Record) -> list[str]:
    return [short_length(record["shape"]["length"]), record["target"].removeprefix("tpu-")]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
