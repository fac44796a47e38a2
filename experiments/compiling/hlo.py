"""What XLA's compiled text says: kernels in it, how often each runs, and XLA's own estimates."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KERNELS = ("tpu_custom_call", "mosaic_gpu_v2", "mosaic_gpu", "triton_kernel_call")


@dataclasses.dataclass(frozen=True)
class Contents:
    """A compiled program's.

    Attributes:
      kernels: how often each kernel's call runs, by the instruction's name; None where a loop
        around it has no number of trips in the text.
      estimated_cycles: of everything else, by XLA's own estimate; 0 where it makes none.
    """

    kernels: Mapping[str, int | None]
    estimated_cycles: int


def read_hlo(text: str) -> Contents:
    """The kernels in a compiled program's text."""
    computations = dict(_computations(text))
    entry = next((name for name in computations if name.startswith("ENTRY ")), None)
    kernels: dict[str, int | None] = {}
    cycles = 0

    def visit(name: str, runs: int | None) -> None:
        nonlocal cycles
        for line in computations.get(name, ()):
            target = re.search(r'custom_call_target="([^"]*)"', line)
            if target and target[1] in _KERNELS:
                instruction = line.removeprefix("ROOT ").split(" ", 1)[0].lstrip("%")
                before = kernels.get(instruction, 0)
                if before is None or runs is None:
                    kernels[instruction] = None
                else:
                    kernels[instruction] = before + runs
                continue
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            # The largest number that there is means that XLA has no estimate.
            if estimate and len(estimate[1]) < 16:
                cycles += int(estimate[1]) * (runs or 1)
            branches = _BRANCHES.search(line)
            called = _CALLED.findall(line) + re.findall(
                r"[\w.\-]+", branches[1] if branches else ""
            )
            for inner in called:
                visit(inner, _times(runs, line, computations))

    if entry:
        visit(entry, 1)
    return Contents(kernels, cycles)


def plain_name(instruction: str) -> str:
    """The name that `pallas_call` was given, without what transformations and XLA put around it."""
    name = re.sub(r"^(?:(?:transpose|jvp|vmap|checkpoint|remat)_)*", "", instruction)
    return re.sub(r"_*(?:\.\d+)*$", "", name)


def _times(runs: int | None, line: str, computations: Mapping[str, list[str]]) -> int | None:
    """How often what an instruction calls runs, if the instruction runs so often."""
    if " while(" not in line or runs is None:
        return runs
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return runs * int(known[1])
    # A scan compares its counter, which begins at 0, with its length.
    name = re.search(r"condition=%?([\w.\-]+)", line)
    condition = "\n".join(computations.get(name[1], ()) if name else ())
    limits = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
    return runs * int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else None


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Names and instructions; the entry's name begins with "ENTRY "."""
    name, lines = "", []
    for line in text.splitlines():
        begun = _COMPUTATION.match(line)
        if begun:
            name, lines = (begun[1] or "") + begun[2], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line.strip())
