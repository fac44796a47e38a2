"""What the TPU compiler dumps while it compiles: how it is asked to, and what is read from it."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments.compiling import trips
from experiments.compiling.bundles import Schedule, Section, read_schedule
from experiments.compiling.machines import Machine
from experiments.compiling.programs import Shape
from experiments.compiling.timing import Expected, kernel_timing, section_cycles

Record = dict[str, Any]

_KINDS = ("final_bundles", "final_hlo-static-per-bundle-utilization", "original")


def dumping_to(folder: pathlib.Path) -> dict[str, str]:
    """The environment in which a process's TPU compiler dumps its schedules, read as it loads.

    Args:
      folder: where to. It is asked for the first and the last of some hundred stages, which are 50
        to 500 KB per kernel.
    """
    flags = (
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=original|final_",
    )
    return {"LIBTPU_INIT_ARGS": " ".join(flags).strip(), "JAX_PLATFORMS": "cpu"}


def read_dump(name: str, folder: pathlib.Path, machine: Machine) -> tuple[Schedule, int]:
    """A kernel's schedule and the bytes of vector memory that it asks for.

    Args:
      name: of the kernel's instruction in the compiled text, as in "scores.1".
      folder: of the dumps.
      machine: compiled for.

    Raises:
      LookupError: there is no dump of it.
    """
    texts = []
    for kind in _KINDS:
        pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{kind}\.txt")
        files = sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name))
        if not files:
            raise LookupError(f"the compiler dumped no {kind} of it")
        texts.append(files[-1].read_text(encoding="utf-8", errors="replace"))
    bundles, utilization, original = texts
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", original)
    schedule = read_schedule(name, bundles, utilization, machine)
    return schedule, sum(int(size, 16) for size in sizes)


def kernel_records(
    kernels: Mapping[str, int | None], folder: pathlib.Path, shape: Shape | None, machine: Machine
) -> list[Record]:
    """Schedules and times of a program's kernels.

    Args:
      kernels: how often each runs, by name.
      folder: of the dumps.
      shape: of the operation; None for a training step, whose loops nobody has counted.
      machine: compiled for.
    """
    records = []
    for name, runs in kernels.items():
        record: Record = {"name": name, "runs": runs}
        try:
            schedule, record["vmem_bytes"] = read_dump(name, folder, machine)
            known = Expected()
            if shape:
                known = trips.expected(name, shape, machine.chip.name, schedule.root)
            sections = schedule.root.walk()
            record["sections"] = [_section(part, schedule, known) for part in sections]
            timing = kernel_timing(schedule, machine, known)
            record |= vars(timing) | {"ms": timing.milliseconds, "bound": timing.bound}
            if known.flops:
                record["floor_tiles_ms"] = 1e3 * known.flops / machine.chip.bf16_flops
        except LookupError as error:
            record["untimed"] = str(error)
        records.append(record)
    return records


def _section(section: Section, schedule: Schedule, expected: Expected) -> Record:
    """What its own bundles hold, and how often it runs where it stands."""
    cycles = max(section_cycles(section), 1)
    slots = {u: n / schedule.capacity[u] for u, n in section.slots.items()}
    shares = {u: round(n / cycles, 4) for u, n in slots.items()}
    spills = section.slots.get("VLOAD:FILL", 0) + section.slots.get("VSTORE:SPILL", 0)
    return {
        "path": section.path,
        "count": expected.count(section),
        "bundles": section.bundles,
        "cycles": section_cycles(section),
        "occupancy": shares | {"MXU": round(section.product_cycles / cycles, 4)},
        "spills": spills,
        "copied_bytes": section.copied_bytes,
    }
