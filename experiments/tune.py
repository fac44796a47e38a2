"""Finds the kernels' tile sizes on this GPU and writes them into `pallas_kernels/tuned.json`.

    python -m experiments.tune [--kernel=select_blocks.scores] [--lengths=8K,128K]
    python -m experiments.tune --compile_only

Every combination of a kernel's search space is compiled ahead of time for an H100; what spills, or
takes more shared memory than there is, is dropped with the reason. The others are timed as the
whole op, and the fastest goes into the table for the device, the dtype and the bucket of shapes.
--compile_only stops before the timing and needs no GPU. 64/4 heads of 128 dims, 16 blocks of 128.
"""

import itertools
import sys
from collections.abc import Sequence

import jax
from absl import flags

from experiments import cli
from experiments.benchmarking.cases import SELECTIONS, Case, parse_length
from experiments.benchmarking.search import KERNELS, compiling, fastest
from msa_jax.utilisation import peak_flops
from pallas_kernels import tuning


def main(argv: Sequence[str]) -> None:
    """Tunes what the flags name."""
    values = cli.parse(argv, _define_flags, usage=__doc__ or "")
    names = values.kernel or list(KERNELS)
    for name in names:
        if name not in KERNELS:
            raise cli.UsageError(f"--kernel={name}: choose from {', '.join(KERNELS)}")
    kind = jax.devices()[0].device_kind
    if not values.compile_only and not peak_flops(kind):
        raise cli.UsageError(f"{kind} is no GPU to time kernels on: --compile_only needs none")
    for name in names:
        for length, dtype in itertools.product(values.lengths, KERNELS[name].dtypes):
            case = Case("msa", parse_length(length), seed=values.seed)
            print(f"{name}, {dtype}, {length} tokens", flush=True)
            survivors = list(compiling(name, case, dtype))
            if not values.compile_only:
                best, bucket = fastest(name, survivors, case, dtype, values.selection)
                tuning.write_entry(name, best, device_kind=kind, dtype=dtype, bucket=bucket)


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string("kernel", [], f"of {', '.join(KERNELS)}; all", flag_values=values)
    flags.DEFINE_list("lengths", "8K,32K,128K", "tokens", flag_values=values)
    flags.DEFINE_enum(
        "selection", "correlated", SELECTIONS[:-1], "of the timed inputs", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the random inputs", flag_values=values)
    flags.DEFINE_bool("compile_only", False, "times nothing, writes nothing", flag_values=values)


if __name__ == "__main__":
    sys.exit(cli.run(main))
