"""Where the devices' time goes, by operation, from the trace that `jax.profiler` wrote.

An operation is what the device ran under one name: a kernel on a GPU, an XLA operation elsewhere.
Time inside an operation that belongs to another one (a loop's body) counts for the inner one.
"""

import collections
import os
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax


class OperationTime(NamedTuple):
    """One operation's part of a trace.

    Attributes:
      name: of the kernel or XLA operation.
      hlo_op: the XLA operation that it spent most time for, "" if the trace does not say.
      calls: how often it ran.
      milliseconds: all calls together.
      share: of all operations' time.
    """

    name: str
    hlo_op: str
    calls: int
    milliseconds: float
    share: float


class DeviceTimes(NamedTuple):
    """All operations of a trace.

    Attributes:
      operations: longest first.
      window_ms: from the first operation's start to the last one's end.
      busy_ms: in which a device ran at least one operation; mean over devices.
    """

    operations: list[OperationTime]
    window_ms: float
    busy_ms: float


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    hlo_op: str


class TraceError(ValueError):
    """A folder without a trace, or a trace without operations."""


def device_times(folder: str | os.PathLike[str]) -> DeviceTimes:
    """Reads the newest trace in `folder`, such as a run's `profile`.

    Raises:
      TraceError: there is none, or no device ran anything in it.
    """
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
    if not files:
        raise TraceError(f"{folder}: no trace (*.xplane.pb); train with train.profile_steps >= 1")
    with warnings.catch_warnings():
        # Of jaxlib's own types, at their first use; made an error there, it ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        trace = jax.profiler.ProfileData.from_file(os.fspath(files[-1]))
        devices = [lines for plane in trace.planes if any(lines := list(_operation_lines(plane)))]
    if not devices:
        raise TraceError(f"{files[-1]}: no device ran an operation while it was traced")
    events = [event for lines in devices for line in lines for event in line]
    window = max(event.end for event in events) - min(event.start for event in events)
    busy = sum(_covered(event for line in lines for event in line) for lines in devices)
    operations = _summed(own for lines in devices for line in lines for own in _own_times(line))
    return DeviceTimes(operations, window / 1e6, busy / len(devices) / 1e6)


def _operation_lines(plane: Any) -> Iterator[list[_Event]]:
    """The lines of a device that hold what it ran: streams (GPU), "XLA Ops" (TPU), threads (CPU).

    Lines that a trace adds from those, by module or by step, would count everything twice.
    """
    lines = {line.name: line for line in plane.lines}
    if plane.name.startswith("/device:"):
        streams = [line for name, line in lines.items() if name.startswith("Stream")]
        chosen = streams or [line for name, line in lines.items() if name == "XLA Ops"]
    elif plane.name == "/host:CPU":
        chosen = list(lines.values())
    else:
        return
    for line in chosen:
        events = []
        for event in line.events:
            hlo_op = str(dict(event.stats).get("hlo_op", ""))
            if event.duration_ns > 0 and (hlo_op or plane.name.startswith("/device:")):
                end = event.start_ns + event.duration_ns
                events.append(_Event(event.start_ns, end, event.name, hlo_op))
        if events:
            yield events


def _own_times(line: Iterable[_Event]) -> Iterator[tuple[_Event, float]]:
    """Each event of one line with its nanoseconds outside of the events within it."""
    open_events: list[tuple[_Event, list[float]]] = []  # and the time of those within
    for event in sorted(line, key=lambda event: (event.start, -event.end)):
        while open_events and open_events[-1][0].end <= event.start:
            yield _closed(open_events)
        open_events.append((event, []))
    while open_events:
        yield _closed(open_events)


def _closed(open_events: list[tuple[_Event, list[float]]]) -> tuple[_Event, float]:
    event, within = open_events.pop()
    if open_events:
        open_events[-1][1].append(event.end - event.start)
    return event, max(event.end - event.start - sum(within), 0.0)


def _covered(events: Iterable[_Event]) -> float:
    """Nanoseconds in which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events):
        total += max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return total


def _summed(times: Iterable[tuple[_Event, float]]) -> list[OperationTime]:
    calls: collections.Counter[str] = collections.Counter()
    nanoseconds: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for event, own in times:
        calls[event.name] += 1
        by_op = nanoseconds[event.name]
        by_op[event.hlo_op] = by_op.get(event.hlo_op, 0.0) + own
    total = sum(sum(by_op.values()) for by_op in nanoseconds.values())
    operations = [
        OperationTime(
            name, max(by_op, key=by_op.__getitem__), calls[name], spent / 1e6, spent / total
        )
        for name, by_op in nanoseconds.items()
        for spent in [sum(by_op.values())]
    ]
    return sorted(operations, key=lambda operation: -operation.milliseconds)
