"""The figures of the long-context evaluation: results in, captioned SVG figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msa_jax.attention.diagnostics import OVERLAP_DISTANCES
from msa_jax.eval import figures
from msa_jax.eval.heat_map import heat_map
from msa_jax.eval.long_context import ResultsFile
from msa_jax.eval.run_figures import CaptionedFigure
from msa_jax.eval.texts import VALIDATION

# As many lines as can be told apart.
_LINES = len(figures.SERIES)

Results = Mapping[str, ResultsFile]


def text_figures(runs: Results) -> dict[str, CaptionedFigure]:
    """Loss by length of every run and text, and by position of every run, by file name."""
    by_length = {}
    for label, results in runs.items():
        for cell, values in results.of_task("perplexity"):
            line = by_length.setdefault(_name(label, cell.variant), {})
            line[cell.length] = values["loss"]
    found = {}
    if by_length:
        svg = line_chart(by_length, x="window (tokens)", y="loss (nats per token)")
        caption = "Loss of the same text, each token predicted once, in windows of several lengths."
        found["loss_by_length"] = CaptionedFigure(svg, caption)
    by_position = {}
    for label, results in runs.items():
        windows = [c for c in results.of_task("perplexity") if c[0].variant == VALIDATION]
        for cell, values in windows[-1 if len(runs) > 1 else -_LINES :]:
            by_position[f"{label}, {figures.short_length(cell.length)}"] = values
    if by_position:
        svg = figures.loss_by_position(
            {name: np.array(v["position_edges"]) for name, v in by_position.items()},
            {name: np.array(v["loss_by_position"]) for name, v in by_position.items()},
        )
        caption = "Held-out loss by place in the window; the legend names the window's length."
        found["loss_by_position"] = CaptionedFigure(svg.replace("document", "window"), caption)
    return found


def needle_figures(label: str, results: ResultsFile) -> dict[str, CaptionedFigure]:
    """Depth by length heat maps of one run, by file name."""
    cells = list(results.of_task("needle"))
    if not cells:
        return {}
    depths = [f"{depth:.0%}" for depth in cells[0][1]["depths"]]
    axes = {"x": "context (tokens)", "y": "depth of the needle"}
    captions = {
        "exact": "Needle in a haystack: share of exact greedy answers.",
        "choice": "Needle in a haystack: share of questions whose right code is likelier than 15 "
        "wrong ones; chance is 0.06.",
    }
    return {
        f"needle_{score}_{label}": CaptionedFigure(
            heat_map(
                np.array([values[score] for _, values in cells]).T,
                depths,
                [figures.short_length(cell.length) for cell, _ in cells],
                title=f"{label}: {score}",
                **axes,
            ),
            caption,
        )
        for score, caption in captions.items()
    }


def ruler_figures(label: str, results: ResultsFile) -> dict[str, CaptionedFigure]:
    """Task by length heat maps of one run, by file name."""
    cells = list(results.of_task("ruler"))
    if not cells:
        return {}
    tasks = list(dict.fromkeys(cell.variant for cell, _ in cells))
    lengths = sorted({cell.length for cell, _ in cells})
    captions = {
        "recall": "RULER-style tasks: share of the right answer's parts in the greedy answer.",
        "choice": "RULER-style tasks: share of questions whose right answer is likelier than 15 "
        "wrong ones; chance is 0.06.",
    }
    found = {}
    for score, caption in captions.items():
        values = np.full((len(tasks), len(lengths)), np.nan)
        for cell, scores in cells:
            values[tasks.index(cell.variant), lengths.index(cell.length)] = scores[score]
        svg = heat_map(
            values,
            [task.replace("_", " ") for task in tasks],
            [figures.short_length(length) for length in lengths],
            x="context (tokens)",
            y="",
            title=f"{label}: {score}",
        )
        found[f"ruler_{score}_{label}"] = CaptionedFigure(svg, caption)
    return found


def recall_figures(label: str, results: ResultsFile) -> dict[str, CaptionedFigure]:
    """Pairs by length heat maps of associative recall of one run, by file name."""
    cells = list(results.of_task("mqar"))
    if not cells:
        return {}
    captions = {
        "accuracy": "Associative recall: share of queries whose likeliest next token is right.",
        "choice": "Associative recall: share of queries whose likeliest value is right; chance "
        "is 0.03.",
    }
    return {
        f"mqar_{score}_{label}": CaptionedFigure(
            heat_map(
                np.array([values[score] for _, values in cells], float).T,
                [str(pairs) for pairs in cells[0][1]["pairs"]],
                [figures.short_length(cell.length) for cell, _ in cells],
                x="context (tokens)",
                y="pairs",
                title=f"{label}: {score}",
            ),
            caption,
        )
        for score, caption in captions.items()
    }


def selection_figures(label: str, results: ResultsFile) -> dict[str, CaptionedFigure]:
    """Recall by length and agreement of neighbours by distance of one run, by file name."""
    cells = [c for c in results.of_task("selection") if c[0].variant == VALIDATION]
    if not cells:
        return {}
    names = ("score_recall", "block_recall", "coverage")
    if all("stability" in values for _, values in cells):
        names += ("stability",)
    by_length = {
        name.replace("_", " "): {cell.length: _mean(values[name]) for cell, values in cells}
        for name in names
    }
    overlap = {
        figures.short_length(cell.length): {
            distance: _mean(values[f"overlap_{distance}"]) for distance in OVERLAP_DISTANCES
        }
        for cell, values in cells[-_LINES:]
    }
    return {
        f"selection_{label}": CaptionedFigure(
            line_chart(by_length, x="context (tokens)", y="mean over layers", top=1.0),
            f"Selection of {label} on held-out text, over queries that had a choice.",
        ),
        f"overlap_{label}": CaptionedFigure(
            line_chart(overlap, x="distance (tokens)", y="shared free blocks", top=1.0),
            f"Share of a query's free blocks that a later query of {label} keeps too, by how much "
            "later it is; the legend names the context.",
        ),
    }


def line_chart(
    lines: Mapping[str, Mapping[int, float]], *, x: str, y: str, top: float | None = None
) -> str:
    """Lines over a logarithmic axis of tokens.

    Args:
      lines: value by number of tokens, by the legend's text.
      x: name of that axis.
      y: of the other.
      top: the other axis goes from 0 to it; None fits it to the values.
    """
    with figures.drawing_style():
        figure, (axes,) = figures.make_panels(1, height=3.4)
        for index, (label, line) in enumerate(lines.items()):
            places = sorted(line)
            axes.plot(places, [line[n] for n in places], label=label, **figures.series_look(index))
        figures.token_axis(axes)
        ticks = sorted({place for line in lines.values() for place in line})
        axes.set_xticks(ticks)
        if top is not None:
            axes.set_ylim(0, 1.02 * top)
        figures.label_axes(axes, x, y, steps=False)
        return figures.finish(figure)


def _name(label: str, text: str) -> str:
    return label if text == VALIDATION else f"{label}, {text}"


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))
