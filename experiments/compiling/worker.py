"""Compiles what one order asks for, and reads what came out; the main program of a process.

The compiler is told where to dump its schedules when it loads, so that a process of its own is
started with that place in its environment. Orders come as JSON lines on standard input, and each is
answered by one line on standard output that begins with `MARK`.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from experiments.compiling import hlo
from experiments.compiling.dumps import kernel_records
from experiments.compiling.machines import MACHINES
from experiments.compiling.programs import Options, Shape, floor_work, program
from experiments.compiling.steps import lower_step
from experiments.compiling.targets import Place, parse_target
from msa_jax.train.config import ExperimentConfig, from_config_dict
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu

Record = dict[str, Any]

MARK = "compile-check-record "
DUMP_VARIABLE = "COMPILE_CHECK_DUMP"


def main() -> None:
    """Answers every order."""
    for line in sys.stdin:
        order = json.loads(line)
        start = time.monotonic()
        try:
            record = _answer(order)
        except Exception as error:  # of this order alone; jax has no class for all
            message = " ".join(str(error).split())
            record = {"error": f"{type(error).__name__}: {message[:1000]}"}
        seconds = round(time.monotonic() - start, 1)
        print(MARK + json.dumps(order | record | {"seconds": seconds}), flush=True)


def _answer(order: Record) -> Record:
    place = parse_target(order["target"])
    shape = Shape(**order["shape"]) if "op" in order else None
    kernels: list[Record] = []
    if shape is None:
        config = from_config_dict(ExperimentConfig, order["config"])
        compiled = lower_step(config, place, order["phase"]).compile()
    else:
        compiled, kernels = _compile_op(order, shape, place)
    contents = hlo.read_hlo(compiled.as_text() or "")
    if place.chip:
        folder = pathlib.Path(os.environ[DUMP_VARIABLE])
        kernels = kernel_records(contents.kernels, folder, shape, MACHINES[place.chip])
    record = _costs(compiled, place) | {"kernels": kernels}
    if not kernels:
        record["kernels"] = [{"name": name, "runs": n} for name, n in contents.kernels.items()]
    if place.chip:
        clock = MACHINES[place.chip].clock_hz
        record["around_ms"] = 1e3 * contents.estimated_cycles / clock
    return record | _floors(order, shape, place)


def _compile_op(order: Record, shape: Shape, place: Place) -> tuple[Any, list[Record]]:
    """The compiled program, and on a GPU what the assembler said of its kernels."""
    with place.traced():
        wanted = program(order["op"], shape, Options(**order["options"]))
    if place.chip:
        return compile_for_tpu(wanted.function, *wanted.arguments, chip=place.chip), []
    leaves, tree = jax.tree.flatten(wanted.arguments)

    def flat(*arrays):
        return wanted.function(*jax.tree.unflatten(tree, arrays))

    # First, for it must be the one for whom the kernels are assembled.
    resources = [vars(kernel) for kernel in compile_for_h100(flat, *leaves)]
    sharding = jax.sharding.SingleDeviceSharding(place.devices()[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in leaves]
    with place.traced():
        return jax.jit(flat).lower(*placed).compile(), resources


def _costs(compiled: Any, place: Place) -> Record:
    """Memory of one device, and XLA's own count of operations; it does not look into kernels."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    used = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return {
        "memory": used | {"device": place.memory_bytes},
        "fits": sum(used.values()) <= place.memory_bytes,
        "xla_flops": costs.get("flops"),
        "xla_bytes": costs.get("bytes accessed"),
    }


def _floors(order: Record, shape: Shape | None, place: Place) -> Record:
    """The least time for the useful work of an operation on a TPU, in milliseconds."""
    useful = floor_work(order["op"], shape) if shape else None
    if useful is None or not place.chip:
        return {}
    chip = MACHINES[place.chip].chip
    eight_bit = order["options"]["index_precision"] == "int8" and chip.int8_ops
    products = useful.flops / (chip.int8_ops if eight_bit else chip.bf16_flops)
    return {
        "floor_mxu_ms": 1e3 * products,
        "floor_hbm_ms": 1e3 * useful.bytes / chip.bytes_per_second,
        # Products over 128 dims leave half of a 256-wide MXU idle.
        "mxu_width_used": min(1.0, (shape or Shape()).head_dim / chip.mxu_size),
    }


if __name__ == "__main__":
    main()
