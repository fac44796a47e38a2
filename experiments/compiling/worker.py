"""Compiles what one order asks for, and reads what came out; the main program of a process.

The compiler is told where to dump its schedules when it loads, so that a process of its own is
started with that place in its environment. Orders come as JSON lines on standard input, and each is
answered by one line on standard output that begins with `MARK`.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax

from experiments.compiling import hlo
from experiments.compiling.configs import config_of, table_name
from experiments.compiling.dumps import kernel_records
from experiments.compiling.kernels import kernels_of
from experiments.compiling.machines import MACHINES
from experiments.compiling.programs import Options, Shape, floor_work, program
from experiments.compiling.steps import lower_step
from experiments.compiling.targets import Place, parse_target
from msa_jax.train.config import ExperimentConfig, from_config_dict
from pallas_kernels.ahead_of_time import compile_for_h100
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu
from pallas_kernels.tuning import trying

Record = dict[str, Any]

MARK = "compile-check-record "
DUMP_VARIABLE = "COMPILE_CHECK_DUMP"

# Kernels whose schedules depend on the length in nothing but the trips of loops are compiled for
# so many tokens: arrays of more do not fit the memory of every chip, and keys of fewer XLA may put
# into vector memory, which the operations forbid and a kernel alone does not.
_TOKENS = 2**17


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
    if shape and order.get("kernels_only"):
        return {"kernels": _kernels_alone(order, shape, place)} | _floors(order, shape, place)
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


def _kernels_alone(order: Record, shape: Shape, place: Place) -> list[Record]:
    """Schedules of an operation's TPU kernels, without the rest of it."""
    op, folder = order["op"], pathlib.Path(os.environ[DUMP_VARIABLE])
    values = vars(config_of(op, shape, place.chip))
    compiled_for = shape
    if op != "select_blocks":
        compiled_for = dataclasses.replace(shape, length=_TOKENS)
    records = []
    with trying(table_name(op), values):
        with place.traced():
            wanted = program(op, compiled_for, Options(**order["options"]))
        for kernel in kernels_of(wanted, place):
            alone = kernel.program
            compiled = compile_for_tpu(alone.function, *alone.arguments, chip=place.chip)
            names = hlo.read_hlo(compiled.as_text() or "").kernels
            machine = MACHINES[place.chip]
            records += kernel_records(dict.fromkeys(names, kernel.runs), folder, shape, machine)
    return records


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
