"""Tables and figures that put contenders side by side; `contenders` reads them."""

from collections.abc import Iterable, Sequence

import numpy as np

from msa_jax.config import ConfigError
from msa_jax.eval import figures
from msa_jax.eval.contenders import LENGTH_SCORES, Contender, mean
from msa_jax.eval.heat_map import heat_map
from msa_jax.eval.run_figures import CaptionedFigure, Figures
from msa_jax.eval.run_numbers import percent, short_number
from msa_jax.eval.tables import Table

# Those that are shares, and make a heat map each.
_SHARES = ("needle", "ruler", "recall")


def main_table(contenders: Sequence[Contender], reference: str) -> Table:
    """What each costs and how well it predicts; losses also relative to a contender's.

    Raises:
      ConfigError: `reference` is the label of none.
    """
    base = mean(_named(contenders, reference).losses)
    head = [
        "",
        "parameters",
        "attention FLOPs per token",
        "training FLOPs per token",
        "tokens per second",
        "validation loss",
        f"relative to {reference}",
        "bits per byte",
        "score recall",
    ]
    rows = [
        [
            one.label,
            short_number(one.parameters),
            short_number(one.attention_flops),
            short_number(one.training_flops),
            f"{mean(one.tokens_per_second):,.0f}",
            _with_spread(one.losses, 4),
            percent(mean(one.losses), base),
            _with_spread(one.bits_per_byte, 4),
            _with_spread(one.score_recall, 3),
        ]
        for one in contenders
    ]
    return head, rows


def length_table(contenders: Sequence[Contender], score: str) -> Table:
    """One of `LENGTH_SCORES`, a row per contender, a column per length."""
    lengths = _lengths(contenders, score)
    head = [LENGTH_SCORES[score].title, *map(figures.short_length, lengths)]
    digits = 4 if score == "loss" else 3
    return head, [
        [one.label, *(_with_spread(one.by_length[score].get(n, ()), digits) for n in lengths)]
        for one in contenders
        if one.by_length[score]
    ]


def length_tables(contenders: Sequence[Contender]) -> Iterable[Table]:
    """Of every score that was measured."""
    for score in LENGTH_SCORES:
        if _lengths(contenders, score):
            yield length_table(contenders, score)


def comparison_figures(contenders: Sequence[Contender]) -> Figures:
    """Losses, and a heat map for each share, by file name."""
    found = {"losses": CaptionedFigure(_losses(contenders), _LOSS_CAPTION)}
    for score in _SHARES:
        lengths = _lengths(contenders, score)
        rows = [one for one in contenders if one.by_length[score]]
        if lengths:
            values = [[mean(one.by_length[score].get(n, ())) for n in lengths] for one in rows]
            svg = heat_map(
                np.array(values),
                [one.label for one in rows],
                [figures.short_length(length) for length in lengths],
                x="context (tokens)",
                y="",
                title=LENGTH_SCORES[score].title,
            )
            caption = f"{LENGTH_SCORES[score].title.capitalize()}: means over seeds and examples."
            found[score] = CaptionedFigure(svg, caption)
    return found


_LOSS_CAPTION = (
    "Validation loss: the mean over seeds, and a bar from the lowest to the highest. Beside each "
    "name its forward attention FLOPs per token of a full row; the dearest stand on top."
)


def _losses(contenders: Sequence[Contender]) -> str:
    rows = sorted(contenders, key=lambda one: one.attention_flops)
    with figures.drawing_style():
        figure, (axes,) = figures.make_panels(1, height=1.2 + 0.3 * len(rows))
        for row, one in enumerate(rows):
            middle = mean(one.losses)
            ends = [[middle - min(one.losses)], [max(one.losses) - middle]]
            colour = figures.SERIES[one.label == "MSA"]
            axes.errorbar([middle], [row], xerr=ends, color=colour, marker="o", capsize=3)
        names = [f"{one.label}, {short_number(one.attention_flops)}" for one in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.margins(y=0.08)
        figures.label_axes(axes, "validation loss (nats per token)", "", steps=False)
        return figures.finish(figure)


def _named(contenders: Sequence[Contender], label: str) -> Contender:
    for one in contenders:
        if one.label == label:
            return one
    labels = ", ".join(one.label for one in contenders)
    raise ConfigError(f"{label!r} is none of what is compared: {labels}")


def _lengths(contenders: Sequence[Contender], score: str) -> list[int]:
    return sorted({length for one in contenders for length in one.by_length[score]})


def _with_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and half of the way from the lowest to the highest."""
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    half = (max(values) - min(values)) / 2
    return text if len(values) == 1 else f"{text} \N{PLUS-MINUS SIGN} {half:.{digits}f}"
