"""The benchmark's picture: time against length with the floor, and speed-up against length."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.benchmarking import summary
from experiments.benchmarking.cases import BASELINES, DENSE, MSA, PRECISIONS, SELECTIONS
from experiments.benchmarking.results import Row
from experiments.benchmarking.summary import Speedup
from msa_jax.eval.figures import LINES, MARKERS, SERIES, STYLE, THEME, short_length

_INK, _GRID = THEME["ink"][0], THEME["grid"][0]
_BASELINE_COLOUR = "#6b7280"


def time_and_speedup(rows: Sequence[Row], what: str) -> str:
    """An SVG on a white page: times and floors on the left, speed-ups on the right.

    Colours tell selections apart, dashes an 8-bit index.

    Args:
      rows: of `results.rows`, of the same passes, at least one of MSA.
      what: that is timed, such as "forward".
    """
    with matplotlib.rc_context({**STYLE, "legend.fontsize": 8.5}):
        figure = Figure(figsize=(10.5, 5.2), layout="constrained", facecolor="white")
        times, factors = figure.subplots(1, 2)
        lengths = sorted({row.case.length for row in rows})
        for axes in (times, factors):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(lengths))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_length(round(x))))
            axes.set_xlabel("tokens")
        _times(times, rows)
        times.set_ylabel(f"time of one layer's {what} (ms)")
        _speedups(factors, rows)
        handles, labels = times.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    for index, (name, title) in enumerate(BASELINES.items()):
        timed = [row for row in rows if row.case.subject == name]
        look = {"color": _BASELINE_COLOUR, "linestyle": LINES[index], "marker": "dxP"[index]}
        _line(axes, timed, title, **look)
    for (selection, precision), series in _series(rows).items():
        _line(axes, series, _label(selection, precision), **_look(selection, precision))
    for precision, linestyle in (("native", ":"), ("int8", "-.")):
        series = [row for row in rows if row.precision == precision]
        floors = {row.case.length: row.whole.floor_ms for row in series}
        if floors:
            points = sorted(floors.items())
            label = f"floor, {_index(precision)}"
            look = {"color": _INK, "linestyle": linestyle, "marker": "_"}
            axes.plot(*zip(*points, strict=True), label=label, **look)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _speedups(axes: Axes, rows: Sequence[Row]) -> None:
    """Over the faster of the dense baselines; hollow where that is extrapolated."""
    axes.axhline(1, color=_INK, linewidth=1)
    for (selection, precision), series in _series(rows).items():
        look, points = _look(selection, precision), []
        for row in series:
            found = summary.speedups(row, rows)
            dense = [found[name] for name in DENSE if name in found]
            if dense:
                points.append((row.case.length, min(dense, key=lambda speedup: speedup.factor)))
        axes.plot(*_xy(points), **look)
        hollow = _xy([point for point in points if point[1].extrapolated_from])
        axes.plot(*hollow, **look | {"linestyle": "", "markerfacecolor": "white"}, zorder=3)
    axes.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.set_ylabel("times faster than the fastest dense kernel")
    axes.set_title("hollow: over an extrapolated dense time", loc="right", fontsize=8.5)


def _xy(points: Sequence[tuple[int, Speedup]]) -> tuple[list[int], list[float]]:
    return [length for length, _ in points], [speedup.factor for _, speedup in points]


def _series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """MSA's rows by selection and precision."""
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.case.subject == MSA:
            series.setdefault((row.selection, row.precision), []).append(row)
    return dict(sorted(series.items(), key=lambda item: SELECTIONS.index(item[0][0])))


def _look(selection: str, precision: str) -> dict[str, Any]:
    index = SELECTIONS.index(selection)
    linestyle = LINES[PRECISIONS.index(precision)]
    return {"color": SERIES[index], "marker": MARKERS[index], "linestyle": linestyle}


def _label(selection: str, precision: str) -> str:
    return f"MSA, {selection}, {_index(precision)}"


def _index(precision: str) -> str:
    return f"{'bf16' if precision == 'native' else precision} index"


def _line(axes: Axes, rows: Sequence[Row], label: str, **look: Any) -> None:
    if rows:
        x = [row.case.length for row in rows]
        axes.plot(x, [row.whole.median_ms for row in rows], label=label, **look)
