"""The benchmark's picture: time against length with the floor, and speed-up against length."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.benchmarking import results
from experiments.benchmarking.cases import BASELINES, MSA
from experiments.benchmarking.results import Row
from msa_jax.eval.figures import LINES, MARKERS, SERIES, THEME, short_length

_INK, _GRID = THEME["ink"][0], THEME["grid"][0]
_BASELINE_COLOUR = "#6b7280"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "msa",  # equal data, equal file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def time_and_speedup(rows: Sequence[Row]) -> str:
    """An SVG on a white page: times and floors on the left, speed-ups on the right.

    Args:
      rows: of `results.rows`, at least one of MSA.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained", facecolor="white")
        times, factors = figure.subplots(1, 2)
        _times(times, rows)
        _speedups(factors, rows)
        lengths = sorted({row.case.length for row in rows})
        for axes in (times, factors):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(lengths))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_length(round(x))))
            axes.set_xlabel("tokens")
            axes.legend(loc="upper left")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    for index, (name, title) in enumerate(BASELINES.items()):
        timed = [row for row in rows if row.case.subject == name]
        _line(axes, timed, title, color=_BASELINE_COLOUR, linestyle=LINES[index], marker="")
    for index, (label, series) in enumerate(_series(rows).items()):
        look = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
        _line(axes, series, label, **look)
    for precision, linestyle in (("native", ":"), ("int8", "-.")):
        series = [row for row in rows if row.precision == precision]
        floors = {row.case.length: row.parts["both"].floor_ms for row in series}
        if floors:
            label = f"floor, {'bf16' if precision == 'native' else precision} index"
            points = sorted(floors.items())
            axes.plot(*zip(*points, strict=True), label=label, color=_INK, linestyle=linestyle)
    axes.set_ylabel("time of one layer's forward (ms)")


def _speedups(axes: Axes, rows: Sequence[Row]) -> None:
    """Over the faster of the dense baselines, hollow where that is extrapolated."""
    axes.axhline(1, color=_INK, linewidth=1)
    for index, (label, series) in enumerate(_series(rows).items()):
        points = []
        for row in series:
            found = results.speedups(row, rows)
            dense = [found[name] for name in results.DENSE if name in found]
            if dense:
                least = min(dense, key=lambda speedup: speedup.factor)
                points.append((row.case.length, least.factor, bool(least.extrapolated_from)))
        if not points:
            continue
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        lengths, factors, _ = zip(*points, strict=True)
        axes.plot(lengths, factors, color=colour, label=label, marker=marker)
        hollow = [point[:2] for point in points if point[2]]
        if hollow:
            axes.plot(
                *zip(*hollow, strict=True), color=colour, marker=marker, mfc="white", linestyle=""
            )
    axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 4, 8, 16, 32, 64]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} x"))
    axes.set_ylabel("times faster than the fastest dense kernel")


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """MSA's rows by legend entry."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.subject == MSA:
            index = "" if row.precision == "native" else f", {row.precision} index"
            series.setdefault(f"MSA, {row.selection} selection{index}", []).append(row)
    return series


def _line(axes: Axes, rows: Sequence[Row], label: str, **look) -> None:
    if rows:
        x = [row.case.length for row in rows]
        axes.plot(x, [row.parts["both"].median_ms for row in rows], label=label, **look)
