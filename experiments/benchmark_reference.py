"""Times the plain-XLA operations and choices between them on this machine.

    python -m experiments.benchmark_reference [--repeats=20] [--output=timings.json]

Value and gradient of each op, 8 x 512 tokens, 4/2 heads of 32 dims, 8 of 32 blocks of 16, float32:
with the references' causal ranges and without. Then the experts' grouped matmul, 16,384 rows of 128
by 8 matrices of 256 columns, in tiles and by `ragged_dot`, beside one dense matmul of all rows.
Wall-clock medians and quartiles after one warm-up call.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags

from experiments import cli
from msa_jax.nn.grouped_matmul import apply_grouped
from pallas_kernels import dense_attention, index_kl, select_blocks, sparse_attention, visibility

_BATCH, _LENGTH, _HEADS, _GROUPS, _DIM = 8, 512, 4, 2, 32
_ROWS, _WIDTH, _INNER, _EXPERTS = 16384, 128, 256, 8


def main(argv: Sequence[str]) -> None:
    """Runs everything, prints a table and writes the same numbers as JSON."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    rows = [(name, *_milliseconds(call, values.repeats)) for name, call in _cases()]
    table = rich.table.Table("case", "median (ms)", "quartiles (ms)", title=str(jax.devices()[0]))
    for name, median, low, high in rows:
        table.add_row(name, f"{median:.1f}", f"{low:.1f} to {high:.1f}")
    rich.console.Console().print(table)
    if values.output:
        names = ("case", "median_ms", "lower_quartile_ms", "upper_quartile_ms")
        record = {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "repeats": values.repeats,
            "timings": [dict(zip(names, row, strict=True)) for row in rows],
        }
        pathlib.Path(values.output).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _cases() -> Iterator[tuple[str, Callable[[], object]]]:
    ranges = visibility.MAX_RANGES
    for count in (ranges, 1):
        visibility.MAX_RANGES = count  # read while tracing
        for name, call in _attention_cases().items():
            yield f"{name}, {count} causal range{'s' if count > 1 else ''}", call
    visibility.MAX_RANGES = ranges
    yield from _matmul_cases().items()


def _attention_cases() -> dict[str, Callable[[], object]]:
    """Value and gradient of the ops, jitted; selection has no gradient."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (_BATCH, _LENGTH, _HEADS, _DIM))
    k, v = jax.random.normal(keys[1], (2, _BATCH, _LENGTH, _GROUPS, _DIM))
    index_q = jax.random.normal(keys[2], (_BATCH, _LENGTH, _GROUPS, _DIM))
    index_k = jax.random.normal(keys[3], (_BATCH, _LENGTH, _DIM))
    blocks = {"block_size": 16, "top_k": 8}
    selection = select_blocks(index_q, index_k, **blocks)

    # Everything is an argument: XLA would compute with constants while it compiles.
    def graded(fn, num_graded, *arguments):
        def loss(*arguments):
            return (fn(*arguments) ** 2).sum()

        run = jax.jit(jax.value_and_grad(loss, tuple(range(num_graded))))
        return lambda: run(*arguments)

    def attend(q, k, v, selection):
        return sparse_attention(q, k, v, selection)[0]

    def align(index_q, index_k, q, k, selection):
        return index_kl(q, k, index_q, index_k, selection).loss

    select = jax.jit(lambda a, b: select_blocks(a, b, **blocks).block_ids)
    return {
        "dense_attention": graded(dense_attention, 3, q, k, v),
        "sparse_attention": graded(attend, 3, q, k, v, selection),
        "index_kl": graded(align, 2, index_q, index_k, q, k, selection),
        "select_blocks, value only": lambda: select(index_q, index_k),
    }


def _matmul_cases() -> dict[str, Callable[[], object]]:
    """Value and gradient of the experts' matmul, the tokens evenly spread."""
    rows = jax.random.normal(jax.random.key(1), (_ROWS, _WIDTH))
    matrices = jax.random.normal(jax.random.key(2), (_EXPERTS, _WIDTH, _INNER))
    sizes = jnp.full(_EXPERTS, _ROWS // _EXPERTS, jnp.int32)

    def grouped(implementation):
        def loss(rows, matrices):
            def multiply(x, matmul):
                return matmul(x, matrices)

            return (apply_grouped(multiply, rows, sizes, implementation=implementation) ** 2).sum()

        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return lambda: run(rows, matrices)

    dense = jax.jit(jax.value_and_grad(lambda x, w: ((x @ w) ** 2).sum(), (0, 1)))
    return {
        "grouped matmul, tiles": grouped("tiles"),
        "grouped matmul, ragged_dot": grouped("ragged_dot"),
        "one dense matmul": lambda: dense(rows, matrices[0]),
    }


def _milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median and quartiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e3)
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("repeats", 20, "timed calls", lower_bound=2, flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the timings", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
