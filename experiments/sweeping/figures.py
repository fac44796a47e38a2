"""The figures of a sweep: rows in, one SVG string out, in the house's style."""

import dataclasses
import itertools
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from experiments.sweeping.objectives import TITLES
from experiments.sweeping.results import Row
from msa_jax.eval.figures import STYLE, THEME, finish, text_on
from msa_jax.train.sweep import Choice, Objective, Parameter, Value

_INK, _GRID = THEME["ink"][0], THEME["grid"][0]
_FRONT, _OTHER = THEME["series-1"][0], THEME["series-0"][0]
# Both ends of the scale show on a light and on a dark page.
_COLOURS = matplotlib.colors.ListedColormap(
    matplotlib.colormaps["viridis"](np.linspace(0.18, 0.95, 256))
)
_MOST_BINS = 6
_MOST_NUMBERS = 12


def pareto(rows: Sequence[Row], objectives: Sequence[Objective]) -> str:
    """Every pair of objectives as a scatter; trials on the common front are filled and numbered.

    Args:
      rows: complete trials.
      objectives: two or more.
    """
    pairs = list(itertools.combinations(objectives, 2))
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.6 * min(len(pairs), 3) + 0.4, 3.5 * -(-len(pairs) // 3)))
        figure.set_layout_engine("constrained")
        grid = figure.subplots(-(-len(pairs) // 3), min(len(pairs), 3), squeeze=False)
        for axes, pair in itertools.zip_longest(grid.flat, pairs):
            if pair is None:
                axes.remove()
                continue
            # The cheaper one is the natural horizontal axis of "what do I get for it".
            _scatter(axes, rows, x=pair[1], y=pair[0])
        return finish(figure, columns=2)


def _scatter(axes: Axes, rows: Sequence[Row], *, x: Objective, y: Objective) -> None:
    for on_front, colour, fill, label in (
        (False, _OTHER, "none", "other trials"),
        (True, _FRONT, _FRONT, "on the Pareto front"),
    ):
        chosen = [row for row in rows if row.on_front == on_front]
        xs, ys = ([row.values[one.name] for row in chosen] for one in (x, y))
        look = 2 + on_front  # the front above the others
        axes.scatter(xs, ys, s=26, edgecolors=colour, facecolors=fill, label=label, zorder=look)
    best = [row for row in rows if row.on_front and row.same_as is None][:_MOST_NUMBERS]
    for row in best:
        place = (row.values[x.name], row.values[y.name])
        axes.annotate(str(row.number), place, (4, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
    for set_label, axis, one in (
        (axes.set_xlabel, axes.xaxis, x),
        (axes.set_ylabel, axes.yaxis, y),
    ):
        better = "lower is better" if one.direction == "minimize" else "higher is better"
        set_label(f"{TITLES[one.name]}\n({better})")
        axis.set_major_locator(MaxNLocator(5))
        if one.name in ("attention_flops", "tokens_per_second"):
            axis.set_major_formatter(EngFormatter())


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values of a parameter as places on an axis.

    Attributes:
      labels: of the places, in order.
      places: of each row.
    """

    labels: list[str]
    places: np.ndarray


def scale(parameter: Parameter, values: Sequence[Value]) -> Scale:
    """A place for each choice, or for each of a few bins of equally many values of a range."""
    if isinstance(parameter, Choice):
        found = [value for value in parameter.values if value in values]
        return Scale([_short(value) for value in found], np.array([found.index(v) for v in values]))
    numbers = np.array(values, float)
    distinct = np.unique(numbers)
    if len(distinct) <= _MOST_BINS:
        return Scale([_short(value) for value in distinct], np.searchsorted(distinct, numbers))
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, _MOST_BINS + 1)))
    places = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    labels = [
        f"{_short(low)} to {_short(high)}" for low, high in itertools.pairwise(edges.tolist())
    ]
    return Scale(labels, places)


def heat_map(
    rows: Sequence[Row], x: Parameter, y: Parameter, objective: Objective, limits: tuple
) -> str:
    """Mean of an objective over the trials of each pair of values of two parameters.

    Args:
      rows: complete trials, at least one.
      x: parameter of the columns.
      y: parameter of the rows.
      objective: what is averaged.
      limits: of the colours.
    """
    columns, lines = (scale(one, [row.parameters[one.field] for row in rows]) for one in (x, y))
    values = np.array([row.values[objective.name] for row in rows])
    means = cell_means(columns, lines, values)
    with matplotlib.rc_context(STYLE):
        height = 1.5 + 0.34 * len(lines.labels)
        figure = Figure((4.4, height), layout="constrained")
        axes = figure.subplots()
        norm = Normalize(*limits)
        axes.imshow(means, norm=norm, cmap=_COLOURS, aspect="auto", interpolation="none")
        axes.grid(False)
        tilted = max(map(len, columns.labels)) > 6 and len(columns.labels) > 4
        axes.set_xticks(range(len(columns.labels)), columns.labels, rotation=30 * tilted)
        axes.set_yticks(range(len(lines.labels)), lines.labels)
        axes.set_xlabel(_leaf(x))
        axes.set_ylabel(_leaf(y))
        for line, column in np.argwhere(np.isfinite(means)):
            mean = means[line, column]
            ink = text_on(_COLOURS(norm(mean)))
            text = short_number(mean)
            axes.text(column, line, text, ha="center", va="center", color=ink, fontsize=8)
        return finish(figure)


def cell_means(columns: Scale, lines: Scale, values: np.ndarray) -> np.ndarray:
    """[lines, columns] means of the values at each place; NaN where there is none."""
    means = np.full((len(lines.labels), len(columns.labels)), np.nan)
    for line, column in {*zip(lines.places.tolist(), columns.places.tolist(), strict=True)}:
        here = (lines.places == line) & (columns.places == column)
        means[line, column] = values[here].mean()
    return means


def parallel_coordinates(
    rows: Sequence[Row], parameters: Sequence[Parameter], objectives: Sequence[Objective]
) -> str:
    """A line per trial through its parameters and objectives, coloured by the first objective.

    Args:
      rows: complete trials, at least one.
      parameters: the axes on the left.
      objectives: those on the right.
    """
    first = np.array([row.values[objectives[0].name] for row in rows])
    norm = Normalize(first.min(), first.max())
    columns = [_parameter_axis(one, rows) for one in parameters]
    columns += [_objective_axis(one, rows) for one in objectives]
    heights = np.stack([column.heights for column in columns], 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure((max(6.0, 1.4 * len(columns) + 1), 4.0), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        for row, line, value in zip(rows, heights, first, strict=True):
            axes.plot(
                range(len(columns)),
                line,
                color=_COLOURS(norm(value)),
                linewidth=2.4 if row.on_front else 0.9,
                alpha=1.0 if row.on_front else 0.55,
                zorder=3 if row.on_front else 2,
            )
        for place, column in enumerate(columns):
            axes.axvline(place, color=_GRID, linewidth=1)
            for height, label in column.ticks:
                axes.annotate(
                    label,
                    (place, height),
                    (3, 1),
                    textcoords="offset points",
                    fontsize=7.5,
                    zorder=5,
                )
        axes.set_xticks(range(len(columns)), [column.title for column in columns])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.15, len(columns) - 0.55)
        scalar = ScalarMappable(norm, _COLOURS)
        bar = figure.colorbar(scalar, ax=axes, label=TITLES[objectives[0].name], pad=0.01)
        bar.ax.yaxis.set_minor_locator(NullLocator())
        return finish(figure)


@dataclasses.dataclass(frozen=True)
class _Column:
    """An axis of the parallel coordinates: heights 0 to 1 of the rows, and (height, label)."""

    title: str
    heights: np.ndarray
    ticks: list[tuple[float, str]]


def _parameter_axis(parameter: Parameter, rows: Sequence[Row]) -> _Column:
    title = _leaf(parameter)
    values = [row.parameters[parameter.field] for row in rows]
    if isinstance(parameter, Choice):
        places = scale(parameter, values)
        top = max(len(places.labels) - 1, 1)
        ticks = [(place / top, label) for place, label in enumerate(places.labels)]
        return _Column(title, places.places / top, ticks)
    numbers = np.array(values, float)
    return _Column(title, *_spread(numbers, log=parameter.log))


def _objective_axis(objective: Objective, rows: Sequence[Row]) -> _Column:
    title = TITLES[objective.name].replace(" (nats per token)", "").replace(" ", "\n", 1)
    return _Column(title, *_spread(np.array([row.values[objective.name] for row in rows])))


def _spread(numbers: np.ndarray, *, log: bool = False) -> tuple[np.ndarray, list]:
    """Heights from the smallest to the largest, and labels at both ends."""
    shown = np.log(numbers) if log else numbers
    low, high = shown.min(), shown.max()
    heights = (shown - low) / ((high - low) or 1.0)
    ends = {0.0: numbers.min(), 1.0: numbers.max()} if high > low else {0.0: numbers.min()}
    return heights, [(height, short_number(value)) for height, value in ends.items()]


def short_number(value: float) -> str:
    """Four digits, with the field's suffixes from ten thousand on: 1.638K, 12.29M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= unit:
            return f"{value / (1e3 if name == 'K' else unit):.4g}{name}"
    return f"{value:.4g}"


def _leaf(parameter: Parameter) -> str:
    """The field without its section, for which a figure has no room; captions have all of it."""
    return parameter.field.rsplit(".", 1)[-1]


def _short(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
