"""What the tables of the report share: how rows begin, and how numbers are written."""

from experiments.benchmarking.cases import BASELINES
from experiments.benchmarking.results import Part, Row
from experiments.benchmarking.summary import Speedup
from msa_jax.eval.figures import short_length


def head(row: Row) -> list[str]:
    """Tokens, kind of selection, precision of the index."""
    precision = {"native": "bf16"}.get(row.precision, row.precision)
    return [short_length(row.case.length), row.selection, precision]


def factors(found: dict[str, Speedup]) -> list[str]:
    """The speed-up over each baseline, with a star where it is extrapolated."""
    texts = []
    for name in BASELINES:
        speedup = found.get(name)
        mark = "*" if speedup and speedup.extrapolated_from else ""
        texts.append(f"{speedup.factor:.2f}{mark}" if speedup else "-")
    return texts


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def span(part: Part) -> str:
    """The fastest and the slowest time."""
    return f"{milliseconds(part.min_ms)} to {milliseconds(part.max_ms)}"


def gigabytes(value: int | None) -> str:
    """Billions of bytes, a dash if unknown."""
    return "-" if value is None else f"{value / 1e9:.1f}"
