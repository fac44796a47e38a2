"""The time that a schedule implies: cycles of each section, times how often it runs.

A section's bundles take a cycle each, or as long as its matrix products occupy their MXU if that is
longer. Waiting for memory is in no schedule: what a kernel copies over the chip's bandwidth is a
second bound, and the larger of the two is the time.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from experiments.compiling.bundles import Schedule, Section
from experiments.compiling.machines import Machine

# Where no unit is as busy as this, it is dependences between bundles that bound the time.
_BUSY = 0.6


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the data decide, in the mean of one run.

    Attributes:
      counts: how often a section runs each time the one around it does, by path. "Lm0.B*" is every
        branch in Lm0 that neither multiplies nor copies and has no number of its own. What is not
        named runs as often as the schedule says, branches always.
      copied_bytes: between HBM and the cores' memories, of all cores; None for what the schedule
        copies, if every copy in it is made each time.
      flops: of the matrix products that the kernel's tiles make necessary, of all cores.
    """

    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    copied_bytes: float | None = None
    flops: float | None = None

    def count(self, section: Section) -> float | None:
        """How often a section runs each time the one around it does; None if nobody knows."""
        known = self.counts.get(section.path)
        if known is None:
            known = self.counts.get(re.sub(r"(^|\.)B\d+$", r"\1B*", section.path))
        return section.trips if known is None else known


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run of a kernel.

    Attributes:
      schedule_ms: cycles of all sections over the clock.
      copy_ms: bytes that it copies over the device's bandwidth.
      occupancy: share of those cycles in which a slot of a unit is filled, or an MXU occupied.
    """

    schedule_ms: float
    copy_ms: float
    occupancy: Mapping[str, float]

    @property
    def milliseconds(self) -> float:
        """The larger of both bounds."""
        return max(self.schedule_ms, self.copy_ms)

    @property
    def bound(self) -> str:
        """What the time is spent on: "HBM", a unit, or "latency"."""
        if self.copy_ms > self.schedule_ms:
            return "HBM"
        unit = max(self.occupancy, key=lambda name: self.occupancy[name])
        return unit if self.occupancy[unit] >= _BUSY else "latency"


def kernel_timing(schedule: Schedule, machine: Machine, expected: Expected) -> Timing:
    """The time of one run.

    Args:
      schedule: of the kernel.
      machine: that it was made for.
      expected: with a count of every loop that has none in the schedule.

    Raises:
      LookupError: a loop without a number of trips.
    """
    cycles = products = copied = 0.0
    slots = dict.fromkeys(schedule.capacity, 0.0)
    for section, runs in _runs(schedule.root, 1.0, expected):
        cycles += runs * section_cycles(section)
        products += runs * section.product_cycles
        copied += runs * section.copied_bytes
        for unit, filled in section.slots.items():
            slots[unit] += runs * filled
    chip = machine.chip
    # Both cores of a chip run the same grid side by side.
    total = expected.copied_bytes
    total = copied * chip.num_cores if total is None else total
    share = {unit: slots[unit] / (cycles * schedule.capacity[unit]) for unit in slots}
    return Timing(
        1e3 * cycles / machine.clock_hz,
        1e3 * total / chip.bytes_per_second,
        share | {"MXU": products / cycles},
    )


def section_cycles(section: Section) -> int:
    """Of its own bundles, once."""
    return max(section.bundles, section.product_cycles)


def _runs(section: Section, runs: float, expected: Expected) -> Iterator[tuple[Section, float]]:
    yield section, runs
    for part in section.parts:
        count = expected.count(part)
        if count is None:
            raise LookupError(f"nobody has said how often loop {part.path} runs")
        yield from _runs(part, runs * count, expected)
