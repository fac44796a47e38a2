"""What came out of one compilation, in words for a terminal."""

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]

# Units of a section's line, in the order of the compiler's own list.
_UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VSTORE", "SALU")


def record_text(record: Record) -> str:
    """Lines on memory, costs, time and kernels; or the error."""
    title = f"{record.get('op') or record['phase'] + ' training step'} for {record['target']}"
    if "error" in record:
        return f"{title}: {record['error']}"
    lines = [title, *_memory(record), *_costs(record)]
    for kernel in record["kernels"]:
        lines += ["", *_kernel(kernel)]
    if not record["kernels"]:
        lines.append("kernels: none, all of it is XLA's")
    return "\n".join(lines)


def operation_ms(record: Record) -> float | None:
    """The time of all kernels of an operation; None where one has no time, or there is none."""
    times = []
    for kernel in record["kernels"]:
        if "ms" not in kernel or kernel["runs"] is None:
            return None
        times.append(kernel["ms"] * kernel["runs"])
    return sum(times) if times else None


def floor_ms(record: Record) -> float | None:
    """The least time of an operation's useful work."""
    if "floor_mxu_ms" not in record:
        return None
    return max(record["floor_mxu_ms"], record["floor_hbm_ms"])


def _memory(record: Record) -> Iterator[str]:
    parts = {name: size for name, size in record["memory"].items() if name != "device"}
    words = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in parts.items())
    device = record["memory"]["device"] / 1e9
    verdict = "fits" if record["fits"] else "DOES NOT FIT"
    total = sum(parts.values()) / 1e9
    yield f"memory of a device, GB: {words}; {total:.3f} of {device:.1f}: {verdict}"


def _costs(record: Record) -> Iterator[str]:
    if record["xla_flops"] is not None:
        gigabytes = (record["xla_bytes"] or 0) / 1e9
        yield (
            f"XLA counts {record['xla_flops'] / 1e12:.3f} TFLOP and {gigabytes:.3f} GB accessed, "
            "outside kernels"
        )
    if record.get("around_ms"):
        yield f"XLA's own estimate of what it runs itself: {record['around_ms']:.3g} ms"
    floor, time = floor_ms(record), operation_ms(record)
    if floor:
        yield (
            f"floor of the useful work: {floor:.3g} ms (MXU {record['floor_mxu_ms']:.3g}, HBM "
            f"{record['floor_hbm_ms']:.3g})"
        )
    if time:
        ratio = f", {time / floor:.2f} times the floor" if floor else ""
        yield f"time that the kernels' schedules imply: {time:.3g} ms{ratio}"


def _kernel(kernel: Record) -> Iterator[str]:
    if "registers" in kernel:
        yield (
            f"{kernel['name']}: {kernel['registers']} registers, {kernel['spill_bytes']} bytes "
            f"spilled, {kernel['stack_bytes']} of stack"
        )
        return
    runs = "an unknown number of times" if kernel["runs"] is None else f"{kernel['runs']} x"
    yield f"{kernel['name']}, {runs}{_time(kernel)}"
    if "sections" not in kernel:
        return
    yield f"VMEM {kernel['vmem_bytes'] / 2**20:.2f} MiB; each section's own bundles, and use in %:"
    yield (
        f"  {'section':16} {'runs':>8} {'bundles':>8} {'cycles':>7} {'spills':>6} {'KB':>8}"
        + "".join(f"{unit:>7}" for unit in _UNITS)
    )
    for section in kernel["sections"]:
        yield _section(section)


def _time(kernel: Record) -> str:
    if "untimed" in kernel:
        return f": no time, {kernel['untimed']}"
    if "ms" not in kernel:
        return ""
    return (
        f": {kernel['ms']:.3g} ms (schedule {kernel['schedule_ms']:.3g}, copies "
        f"{kernel['copy_ms']:.3g}), bound by {kernel['bound']}{_tiles_floor(kernel)}"
    )


def _tiles_floor(kernel: Record) -> str:
    floor = kernel.get("floor_tiles_ms")
    return (
        f"; {kernel['ms'] / floor:.2f} times its tiles' products, {floor:.3g} ms" if floor else ""
    )


def _section(section: Record) -> str:
    count = "?" if section["count"] is None else f"{section['count']:.4g}"
    shares = "".join(f"{100 * section['occupancy'].get(unit, 0):7.0f}" for unit in _UNITS)
    return (
        f"  {section['path'] or 'kernel':16} {count:>8} {section['bundles']:8} "
        f"{section['cycles']:7} {section['spills']:6} {section['copied_bytes'] / 1024:8.0f}{shares}"
    )
