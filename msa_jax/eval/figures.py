"""The report's figures: arrays in, one SVG string out.

Colours are CSS variables with a fallback (`var(--series-0, #0072b2)`), so that a page can restyle a
figure for a dark background while the bare SVG stays readable; `theme_css` defines them for both.
Series colours are after Okabe and Ito, which colour-blind readers can tell apart; series differ by
marker and dashes too.
"""

import dataclasses
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

THEME = {  # name: (light, dark)
    "ink": ("#1f2328", "#e6e8ea"),
    "grid": ("#d8dce1", "#3a4048"),
    "series-0": ("#0072b2", "#56b4e9"),
    "series-1": ("#d55e00", "#f2914a"),
    "series-2": ("#009e73", "#3fc99b"),
    "series-3": ("#aa4f86", "#dd93bf"),
}
PAPER = ("#ffffff", "#14171a")
SERIES = [light for name, (light, _) in THEME.items() if name.startswith("series")]
MARKERS = ("o", "s", "^", "D")
LINES = ("-", "--", "-.", ":")

# The block picture is a bitmap, so its colours are fixed ones that show on light and dark.
SELECTED, LOCAL, UNSELECTED = "#2b86c5", "#e69f00", "#8c96a05c"
NOT_VISIBLE, VISIBLE, KEPT, OWN = range(4)

_INK, _GRID = THEME["ink"][0], THEME["grid"][0]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "msa",  # equal data, equal file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "legend.fontsize": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
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
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
_WIDTH = 5.0  # inches; a page shows a figure at 350 to 560 CSS pixels


def theme_css(scope: str = ":root") -> str:
    """CSS that defines the figures' colours, and the page's as `--paper`, light and dark."""
    colours = {**THEME, "paper": PAPER}
    rules = [
        "".join(f"--{name}:{pair[mode]};" for name, pair in colours.items()) for mode in (0, 1)
    ]
    return f"{scope}{{{rules[0]}}}@media(prefers-color-scheme:dark){{{scope}{{{rules[1]}}}}}"


def standalone(svg: str) -> str:
    """A figure as a file of its own, on an opaque page in the viewer's light or dark scheme."""
    style = f"{theme_css('svg')}svg{{background:var(--paper)}}"
    return svg.replace(">", f"><style>{style}</style>", 1)


@dataclasses.dataclass(frozen=True)
class LossCurve:
    """One model's losses in nats per token: [N] steps and values of training and validation."""

    train_steps: np.ndarray
    train_loss: np.ndarray
    validation_steps: np.ndarray
    validation_loss: np.ndarray


def loss_curves(curves: Mapping[str, LossCurve]) -> str:
    """Training (thin) and validation (markers) loss of each model over the steps."""
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        for index, (label, curve) in enumerate(curves.items()):
            look = series_look(index)
            axes.plot(
                curve.train_steps, curve.train_loss, color=look["color"], alpha=0.45, linewidth=1
            )
            name = f"{label} validation (training: thin line)"
            axes.plot(curve.validation_steps, curve.validation_loss, label=name, **look)
        label_axes(axes, "optimizer step", "loss (nats per token)")
        return finish(figure)


def loss_gap(steps: np.ndarray, percent: np.ndarray, label: str, reference: str) -> str:
    """Relative difference of two models' validation losses, in percent, over the common steps."""
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        axes.axhline(0, color=_INK, linewidth=1)
        axes.plot(steps, percent, **series_look(0))
        bound = 1.15 * max(np.nanmax(np.abs(percent)), 1.0)
        axes.set_ylim(-bound, bound)
        label_axes(axes, "optimizer step", f"{label} loss above {reference} (%)")
        return finish(figure)


def recall(
    steps: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], reference: Mapping[str, str]
) -> str:
    """Selection recalls over training: the mean over layers, and the span of the layers as a band.

    Args:
      steps: [N] by metric name.
      values: [N, L] by metric name, 0 to 1.
      reference: the legend's text by metric name.
    """
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        for index, (name, layers) in enumerate(values.items()):
            look = series_look(2 + index) | {"linestyle": LINES[index]}  # 0 and 1 are models
            axes.plot(steps[name], layers.mean(1), label=reference[name], **look)
            low, high = layers.min(1), layers.max(1)
            axes.fill_between(steps[name], low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_ylim(0, 1.02)
        label_axes(axes, "optimizer step", "recall (1 = everything)")
        return finish(figure)


def kl_per_layer(steps: np.ndarray, values: np.ndarray, layers: Sequence[int], warmup: int) -> str:
    """KL(main branch || index branch) over training, a line per layer.

    Args:
      steps: [N].
      values: [N, L], nats.
      layers: [L] the layers' numbers.
      warmup: steps of dense warm-up, whose end is marked; 0 marks nothing.
    """
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        if warmup:
            axes.axvline(warmup, color=_INK, linewidth=1, linestyle=":")
        colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.88, len(layers)))
        palette = matplotlib.colors.ListedColormap(colours)
        for column, colour in zip(values.T, colours, strict=True):
            axes.plot(steps, column, color=colour)
        if (values > 0).any():
            axes.set_yscale("log")
        bounds = np.arange(len(layers) + 1) - 0.5
        bar = figure.colorbar(
            ScalarMappable(BoundaryNorm(bounds, palette.N), palette), ax=axes, label="layer"
        )
        shown = spread(len(layers), 8)
        bar.set_ticks(shown, labels=[str(layers[index]) for index in shown])
        bar.ax.yaxis.set_minor_locator(NullLocator())
        label_axes(axes, "optimizer step", "KL (nats)")
        return finish(figure)


def expert_load(loads: Mapping[str, np.ndarray], layers: Mapping[str, Sequence[int]]) -> str:
    """Heat map of each model's expert load relative to an even split (1).

    Args:
      loads: [L, E] tokens per expert, any scale, by model.
      layers: [L] the layers' numbers, by model.
    """
    with drawing_style():
        rows = max(len(load) for load in loads.values())
        figure, panels = make_panels(len(loads), height=min(1.6 + 0.28 * rows, 5.0), share_y=False)
        relative = {
            label: load / np.maximum(load.mean(1, keepdims=True), np.finfo(float).tiny)
            for label, load in loads.items()
        }
        top = max(2.0, *(load.max() for load in relative.values()))
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=top)
        for axes, (label, load) in zip(panels, relative.items(), strict=True):
            axes.imshow(load, norm=norm, cmap="PuOr_r", aspect="auto", interpolation="none")
            axes.grid(False)
            axes.set_title(label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            shown = spread(len(load), 8)
            axes.set_yticks(shown, [str(layers[label][index]) for index in shown])
            label_axes(axes, "expert", "layer" if axes is panels[0] else "", steps=False)
        scale = ScalarMappable(norm, "PuOr_r")
        figure.colorbar(scale, ax=panels, label="load (1 = even)", ticks=[0, 0.5, 1, top])
        return finish(figure)


def selection_states(block_ids: np.ndarray, segment_ids: np.ndarray, block_size: int) -> np.ndarray:
    """What each query does with each block: NOT_VISIBLE, VISIBLE, KEPT, or its OWN block.

    Args:
      block_ids: [T, K] one group's selection, -1 where empty.
      segment_ids: [T] documents, 0 for padding.
      block_size: tokens per block.

    Returns:
      [T, blocks] int8.
    """
    length = len(segment_ids)
    blocks = -(-length // block_size)
    query, block = np.arange(length)[:, None], np.arange(blocks)[None, :]
    same = segment_ids[:, None] == segment_ids[::block_size][None, :]
    visible = same & (segment_ids[:, None] > 0) & (block <= query // block_size)
    states = np.where(visible, VISIBLE, NOT_VISIBLE).astype(np.int8)
    row, slot = np.nonzero(block_ids >= 0)
    states[row, block_ids[row, slot]] = KEPT
    own = np.arange(length) // block_size
    kept_own = (block_ids == own[:, None]).any(1)
    states[np.flatnonzero(kept_own), own[kept_own]] = OWN
    return states


def selected_blocks(block_ids: np.ndarray, segment_ids: np.ndarray, block_size: int) -> str:
    """Queries x blocks picture of one layer's selection, a panel per group.

    Args:
      block_ids: [Hkv, T, K].
      segment_ids: [T].
      block_size: tokens per block.
    """
    with drawing_style():
        groups, length = block_ids.shape[:2]
        columns = min(groups, 2)
        rows = -(-groups // columns)
        figure = Figure((_WIDTH, 0.6 + 2.6 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        fills = ["#00000000", UNSELECTED, SELECTED, LOCAL]
        palette = np.array([matplotlib.colors.to_rgba(fill) for fill in fills])
        for group, axes in enumerate(grid.flat):
            if group >= groups:
                axes.remove()
                continue
            states = selection_states(block_ids[group], segment_ids, block_size)
            extent = (-0.5, states.shape[1] - 0.5, length, 0)
            axes.imshow(palette[states], extent=extent, aspect="auto", interpolation="none")
            axes.grid(False)
            axes.set_title(f"group {group}")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            if axes.get_subplotspec().is_last_row() or group + columns >= groups:
                axes.set_xlabel(f"key block ({block_size} tokens each)")
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel("query (token position)")
        names = ["kept block", "query's own block, always kept", "visible, not kept"]
        patches = [
            Patch(facecolor=fill, label=name)
            for fill, name in zip((SELECTED, LOCAL, UNSELECTED), names, strict=True)
        ]
        return finish(figure, patches, columns=2)


def loss_by_position(edges: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray]) -> str:
    """Mean validation loss by position in the document, on a logarithmic axis.

    Args:
      edges: [P + 1] token positions by model, bounds of the buckets.
      losses: [P] nats per token by model.
    """
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        for index, (label, loss) in enumerate(losses.items()):
            middle = (edges[label][1:] + edges[label][:-1]) / 2
            axes.plot(middle, loss, label=label, **series_look(index))
        token_axis(axes)
        label_axes(axes, "position in the document (tokens)", "loss (nats per token)", steps=False)
        return finish(figure)


def by_context(
    lengths: np.ndarray,
    values: Mapping[str, np.ndarray],
    quantity: str,
    *,
    log: bool,
    hollow: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> str:
    """A computed quantity of each model over the context length.

    Args:
      lengths: [N] tokens.
      values: [N] by model.
      quantity: the vertical axis, with its unit.
      log: whether that axis is logarithmic; a linear one starts at 0.
      hollow: [N] bool by model, the points whose markers are drawn hollow; none without.
    """
    with drawing_style():
        figure, (axes,) = make_panels(1, height=3.4)
        for index, (label, line) in enumerate(values.items()):
            axes.plot(lengths, line, label=label, **series_look(index))
            if label in hollow:
                points, look = hollow[label], series_look(index) | {"linestyle": ""}
                axes.plot(lengths[points], line[points], **look, markerfacecolor=PAPER[0])
        token_axis(axes)
        axes.xaxis.set_major_locator(FixedLocator(list(lengths[::-2])))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        else:
            axes.set_ylim(bottom=0)
        label_axes(axes, "context (tokens)", quantity, steps=False)
        return finish(figure, columns=2 if len(values) > 2 else 1)


def short_length(tokens: int) -> str:
    """A context length as people say it: 8192 -> "8K", 1048576 -> "1M"."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit:
            return f"{tokens / unit:g}{name}"
    return str(tokens)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spread, both ends among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def drawing_style():
    """The context that every figure is drawn in."""
    return matplotlib.rc_context(STYLE)


def series_look(index: int) -> dict[str, Any]:
    """How the line of series `index` is drawn: by colour, marker and dashes at once."""
    choice = index % len(SERIES)
    return {"color": SERIES[choice], "marker": MARKERS[choice], "linestyle": LINES[choice]}


def make_panels(count: int, *, height: float, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, `height` inches high, and its axes side by side."""
    figure = Figure((_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=share_y, squeeze=False)[0])


def token_axis(axes: Axes) -> None:
    """Makes x a logarithmic axis of tokens, 8K for 8192."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_length(int(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def label_axes(axes: Axes, x: str, y: str, *, steps: bool = True) -> None:
    """Names both axes; one of optimizer steps has whole numbers."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if steps:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def text_on(colour: Sequence[float]) -> str:
    """The colour of text on a cell that is the same on every page: nearly black or nearly white.

    Black and white themselves become the page's own. `colour` is sRGB, each channel 0 to 1.
    """
    channels = np.asarray(colour[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    # At 0.18 both contrast alike.
    return "#010101" if luminance > 0.18 else "#fefefe"


def finish(figure: Figure, handles: Sequence[Artist] | None = None, *, columns: int = 1) -> str:
    """Puts the legend below the axes and returns the figure as an SVG element."""
    if handles is None:
        handles = figure.axes[0].get_legend_handles_labels()[0]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # Several figures share a page: ids must not meet, and the size is the page's business.
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", svg)
    svg = re.sub(r'(<svg [^>]*?) ?width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) ?height="[^"]*"', r"\1", svg, count=1)
    for variable, (light, _) in {**THEME, "paper": PAPER}.items():
        svg = svg.replace(light, f"var(--{variable}, {light})")
    return svg
