"""Reads a kernel's schedule, as the TPU compiler dumps it, into a tree of loops and branches.

A bundle is what a core issues in one cycle. `final_bundles` lists them with labels and branches,
`final_hlo-static-per-bundle-utilization` says for each how many of every unit's slots it fills.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from experiments.compiling.machines import GRANULE_BYTES, Machine

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2})\b)? *:", re.MULTILINE)
_BRANCH = re.compile(r"= sbr\.rel \(!?(%p\d+)_p\d+\) target = \$region(\d+)")
_PRODUCT = re.compile(r"= (vmatmul\.\S*?)mxu(\d)")
_COPY = re.compile(r"dma\.(?:hbm_to_[vs]mem|[vs]mem_to_hbm) [^;}]*?size_in_granules=\*/(\d+)")


@dataclasses.dataclass(frozen=True)
class Section:
    """Bundles that run equally often: a kernel, a loop's body, or what a branch may skip.

    Attributes:
      path: "" for the kernel. "Lm0.Bc1" is, in the kernel's first loop that multiplies matrices,
        the second of the branches that copy: L is a loop and B a branch, m multiplies (in what it
        holds, too), c only copies, and nothing stands for neither. The number is by order of
        appearance among its like in the innermost loop around; branches around do not count, for
        they are laid out differently on each chip.
      trips: how often a loop runs each time it is entered, None where that is not a constant.
      bundles: its own, without those of the parts.
      slots: filled in them, by unit.
      product_cycles: for which the busiest MXU is occupied by them.
      copied_bytes: between HBM and the core's memories, where the text gives a size.
      parts: loops and branches in it.
    """

    path: str
    trips: int | None
    bundles: int
    slots: Mapping[str, int]
    product_cycles: int
    copied_bytes: int
    parts: tuple["Section", ...] = ()

    @property
    def work(self) -> str:
        """What it and all in it do: "m", "c" or ""."""
        if any(part.product_cycles for part in self.walk()):
            return "m"
        return "c" if any(part.copied_bytes for part in self.walk()) else ""

    def walk(self) -> Iterator["Section"]:
        """Itself and all below it, in order of appearance."""
        yield self
        for part in self.parts:
            yield from part.walk()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's.

    Attributes:
      name: as `pallas_call` was given it, with the number that XLA appends.
      capacity: slots of each unit in a bundle.
      root: all its bundles.
    """

    name: str
    capacity: Mapping[str, int]
    root: Section


@dataclasses.dataclass(frozen=True)
class _Bundle:
    label: str
    text: str
    slots: Sequence[int]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Bundles [start, stop) of a loop ("L") or a branch ("B")."""

    start: int
    stop: int
    kind: str
    trips: int | None = 1


def read_schedule(name: str, bundles: str, utilization: str, machine: Machine) -> Schedule:
    """The schedule of a kernel.

    Args:
      name: of the kernel.
      bundles: text of its `final_bundles`.
      utilization: text of its `final_hlo-static-per-bundle-utilization`.
      machine: whose it is.

    Raises:
      ValueError: the texts do not belong together, or are of a form that is not known.
    """
    units, capacity, rows = _read_utilization(utilization)
    marks = list(_BUNDLE.finditer(bundles))
    if not marks or len(marks) != len(rows):
        raise ValueError(f"{name}: {len(marks)} bundles, utilization of {len(rows)}")
    ends = [mark.start() for mark in marks[1:]] + [len(bundles)]
    listing = [
        _Bundle(mark[2] or "", bundles[mark.end() : end], row)
        for mark, end, row in zip(marks, ends, rows, strict=True)
    ]
    spans = [*_loops(listing, machine), *_branches(listing, machine)]
    whole = _Span(0, len(listing), "", 1)
    root = _section(whole, _proper(spans), listing, units, machine)
    return Schedule(name, dict(zip(units, capacity, strict=True)), _named(root, "", {}))


def _read_utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Units, slots of each in a bundle, and the slots filled by bundle."""
    lines = text.splitlines()
    if len(lines) < 4 or "UTILIZATION" not in lines[3]:
        raise ValueError(f"utilization begins with {lines[:4]}, not with units and capacities")
    units = [unit.strip() for unit in lines[1].split(",")]
    rows = [[int(number) for number in line.split()] for line in lines[2:3] + lines[4:] if line]
    return units, rows[0], rows[1:]


def _loops(listing: Sequence[_Bundle], machine: Machine) -> Iterator[_Span]:
    """A loop begins with its label, and ends behind the branch back to a region begun there."""
    started = {}
    for place, bundle in enumerate(listing):
        if bundle.label == "LB":
            for region in re.findall(r"Start region (\d+)", bundle.text):
                started[region] = place
    text = "".join(bundle.text for bundle in listing)
    for place, bundle in enumerate(listing):
        for predicate, region in _BRANCH.findall(bundle.text):
            start = started.get(region, place)
            if start < place:
                stop = min(place + machine.branch_delay + 1, len(listing))
                yield _Span(start, stop, "L", _trips(predicate, text))


def _trips(predicate: str, text: str) -> int | None:
    """How often a loop runs whose last bundles compare its counter with a constant."""
    test = re.search(rf"{predicate}_p\d+ = scmp\.ge\.s32\.totalorder (%s\d+)_s\d+, (\S+)", text)
    if test is None or not test[2].isdigit():
        return None
    counter, limit = test[1], int(test[2])
    step = _definition(counter, r"sadd\.s32 (?:1, )?(%s\d+)_s\d+(?:, 1\b)?", text)
    first = _definition(step, r"sphi (%s\d+)_s\d+", text)
    begin = _definition(first, r"smov (?:\(!?%p\d+_p\d+\), )?(\d+)\b", text)
    # A counter kept in memory hides where it began; loops begin at 0 unless told otherwise.
    return limit - int(begin or 0)


def _definition(name: str | None, form: str, text: str) -> str | None:
    """What a scalar is made of, if it is defined in this form."""
    found = name and re.search(rf"{name}_s\d+ = {form}", text)
    return found[1] if found else None


def _branches(listing: Sequence[_Bundle], machine: Machine) -> Iterator[_Span]:
    """What a forward branch skips, up to its fall-through label.

    A branch to region N skips region N - 1, whose end is in the text unless the compiler made it;
    else they nest as brackets do.
    """
    started: set[str] = set()
    ended = {
        region: place
        for place, bundle in enumerate(listing)
        for region in re.findall(r"End region (\d+)", bundle.text)
    }
    pending: list[tuple[int, int | None]] = []  # first bundle skipped, and the last one if known
    for place, bundle in enumerate(listing):
        if bundle.label == "PF" and pending:
            over = [branch for branch in pending if branch[1] is not None and branch[1] < place]
            if not over and pending[-1][1] is None:
                over = pending[-1:]
            pending = [branch for branch in pending if branch not in over]
            # One that skips all of a kernel, on the core that has no part in it, is no choice.
            if "exit bundle" not in bundle.text:
                yield from (_Span(start, place, "B") for start, _ in over if start < place)
        started.update(re.findall(r"Start region (\d+)", bundle.text))
        for _, region in _BRANCH.findall(bundle.text):
            if region not in started:
                checked = ended.get(str(int(region) - 2), 0)
                start = max(place + machine.branch_delay, checked) + 1
                last = ended.get(str(int(region) - 1))
                pending.append((start, last if last is None or last >= place else None))


def _proper(spans: Sequence[_Span]) -> list[_Span]:
    """Spans in order, without those that overlap another one that began before, nor repeats."""
    kept: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.stop, s.kind != "L")):
        around = [other for other in kept if other.start <= span.start < other.stop]
        same = any((other.start, other.stop) == (span.start, span.stop) for other in around)
        if not same and all(span.stop <= other.stop for other in around):
            kept.append(span)
    return kept


def _section(
    span: _Span,
    spans: Sequence[_Span],
    listing: Sequence[_Bundle],
    units: Sequence[str],
    machine: Machine,
) -> Section:
    """The section of a span, with a path that says only whether it is a loop or a branch."""
    inside = [s for s in spans if _within(s, span)]
    children = [s for s in inside if not any(_within(s, other) for other in inside)]
    taken = {place for child in children for place in range(child.start, child.stop)}
    own = [listing[n] for n in range(span.start, span.stop) if n not in taken]
    text = "".join(bundle.text for bundle in own)
    by_mxu: dict[str, int] = {}
    for mnemonic, mxu in _PRODUCT.findall(text):
        by_mxu[mxu] = by_mxu.get(mxu, 0) + machine.product_cycles(mnemonic)
    return Section(
        span.kind,
        span.trips,
        len(own),
        {unit: sum(bundle.slots[n] for bundle in own) for n, unit in enumerate(units)},
        max(by_mxu.values(), default=0),
        GRANULE_BYTES * sum(int(size) for size in _COPY.findall(text)),
        tuple(_section(child, inside, listing, units, machine) for child in children),
    )


def _within(span: _Span, other: _Span) -> bool:
    return span is not other and other.start <= span.start and span.stop <= other.stop


def _named(section: Section, loop: str, numbers: dict[str, int]) -> Section:
    """The section with paths below it; `loop` is that of the innermost loop around its parts."""
    parts = []
    for part in section.parts:
        name = f"{loop}.{part.path}{part.work}".lstrip(".")
        number = numbers.get(name, 0)
        numbers[name] = number + 1
        path = f"{name}{number}"
        inner = path if part.path == "L" else loop
        parts.append(dataclasses.replace(_named(part, inner, numbers), path=path))
    return dataclasses.replace(section, parts=tuple(parts))
