"""Several models against the usual published estimate, as a Markdown page."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.benchmarking.results import ResultError
from experiments.costing import words
from experiments.costing.costs import BreakEven, CostRow, Setting, break_evens, cost_rows
from experiments.costing.shapes import ESTIMATES, PublishedEstimate
from msa_jax import economics
from msa_jax.config import ArchitectureConfig, dense_twin
from msa_jax.eval.figures import short_length
from msa_jax.eval.tables import Table
from msa_jax.train.config import ExperimentConfig

LENGTHS = tuple(estimate.length for estimate in ESTIMATES)

Range = tuple[float, float]


class Model(NamedTuple):
    """One model's costs at `LENGTHS`, and its break-even lengths."""

    config: ArchitectureConfig
    rows: list[CostRow]
    evens: list[BreakEven]


def models(configs: Mapping[str, ArchitectureConfig], setting: Setting) -> dict[str, Model]:
    """The costs of each model, by name."""
    return {
        name: Model(config, cost_rows(config, LENGTHS, setting), break_evens(config, setting))
        for name, config in configs.items()
    }


def estimate_table(
    found: Mapping[str, Model],
    share: Callable[[CostRow], float],
    saved: Callable[[CostRow], float],
) -> Table:
    """Attention's share and the saving of each model, in bold where the estimate holds."""
    header = ["model"]
    for what in ("attention's share, dense", "saved by MSA"):
        header += [f"{what}, {short_length(length)}" for length in LENGTHS]
    published = ["*the estimate*", *(_span(e.attention) for e in ESTIMATES)]
    lines = [[*published, *(_span(e.saved) for e in ESTIMATES)]]
    for name, model in found.items():
        pairs = list(zip(model.rows, ESTIMATES, strict=True))
        line = [_bold(share(row), estimate.attention) for row, estimate in pairs]
        line += [_bold(saved(row), estimate.saved) for row, estimate in pairs]
        lines.append([name, *line])
    return header, lines


def by_flops(found: Mapping[str, Model]) -> Table:
    """The estimate held against forward FLOPs."""
    return estimate_table(found, lambda row: row.flops_share.dense, lambda row: row.flops.saved)


def by_time(found: Mapping[str, Model]) -> Table:
    """The estimate held against prefill time at measured rates."""
    return estimate_table(found, lambda row: row.time_share.dense, lambda row: row.prefill.saved)


def break_even_table(found: Mapping[str, Model], worst: Mapping[str, Model]) -> Table:
    """From how many tokens on MSA is cheaper, by model.

    Args:
      found: the models by name.
      worst: the same at the rates of random selections, whose passes are shown beside.
    """
    first = next(iter(found.values()))
    header = ["model", *(even.what for even in first.evens)]
    header += [f"{even.what}, random selections" for even in first.evens[:2]]
    lines = []
    for name, model in found.items():
        evens = [*model.evens, *worst[name].evens[:2]]
        lines.append([name, *(even.text for even in evens)])
    return header, lines


def implied_shares() -> list[tuple[PublishedEstimate, Range]]:
    """What the estimate of the first length says of the others, for dense attention.

    Everything but attention takes the same for every token, attention as much as there are tokens
    before it, so that share / (1 - share) grows with the length.
    """
    first, *others = ESTIMATES

    def at(share: float, factor: float) -> float:
        odds = share / (1 - share) * factor
        return odds / (1 + odds)

    low, high = first.attention
    factors = [(other, other.length / first.length) for other in others]
    return [(other, (at(low, factor), at(high, factor))) for other, factor in factors]


def implied_speedup(estimate: PublishedEstimate) -> float:
    """How many times cheaper attention becomes, by the middles of the estimate's ranges."""
    share, saved = sum(estimate.attention) / 2, sum(estimate.saved) / 2
    return share / (share - saved)


def kernel_speedup(rates: economics.KernelRates, config: ArchitectureConfig, length: int) -> float:
    """How many times faster a layer of MSA is than a dense one, forward, at measured rates."""
    work = economics.cost.attention_flops(config.attention, length)
    dense = economics.cost.attention_flops(dense_twin(config).attention, length)
    seconds = work.main / rates.main.at(length) + work.index / rates.selection.at(length)
    return dense.main / rates.dense_forward.at(length) / seconds


def conclusion(found: Mapping[str, Model], setting: Setting, paper: ArchitectureConfig) -> str:
    """In plain words, with the numbers of the tables."""
    first = ESTIMATES[0]
    implied = " and ".join(f"{_span(r)} at {short_length(e.length)}" for e, r in implied_shares())
    speedups = ", ".join(
        f"{implied_speedup(e):.1f} at {short_length(e.length)} "
        f"(ours: {kernel_speedup(setting.machine.kernels, paper, e.length):.1f})"
        for e in ESTIMATES
    )
    low, high = _extremes(found, lambda row: row.time_share.dense)
    return words.bullets(
        [
            "**By FLOPs** attention's share is as estimated "
            f"{_where(found, lambda row: row.flops_share.dense)}.",
            f"**By time** it is so {_where(found, lambda row: row.time_share.dense)}.",
            "**No model with dense attention in every layer can meet it at all three lengths.** "
            "Per token, attention grows with the context and the rest does not, so that "
            f"share / (1 - share) grows as the length: {_span(first.attention)} at "
            f"{short_length(first.length)} means {implied}.",
            "**It expects less of sparse attention than was measured.** Share and saving together "
            f"say that attention gets so many times cheaper: {speedups}. Ours is one layer of the "
            "paper's shape, forward, selection included.",
            "**What decides is the width of attention (query heads times head dim) against the "
            f"parameters active per layer.** At {short_length(first.length)} attention takes {low} "
            f"to {high} of a dense prefill's time. The mixtures of experts here have few active "
            "parameters under wide attention: long context costs them more, and MSA saves more "
            "of it.",
        ]
    )


def measured_steps(folder: pathlib.Path, config: ExperimentConfig, setting: Setting) -> Table:
    """The cost model's training steps beside those that were measured.

    Args:
      folder: has h100_350m_profile_msa.json and _gqa.json of `experiments.profile_table`.
      config: the MSA run that was profiled.
      setting: with cuDNN as the dense kernel, as the run had.

    Raises:
      ResultError: a profile is missing or damaged.
    """
    lines, length = [], config.data.sequence_length
    tokens = config.data.batch_size * length
    for name, model in (("msa", config), ("gqa", dense_twin(config))):
        path = folder / f"h100_350m_profile_{name}.json"
        try:
            step = json.loads(path.read_text(encoding="utf-8"))["milliseconds_per_step"]
        except (OSError, ValueError, KeyError) as error:
            raise ResultError(
                f"{path}: not a table of experiments.profile_table: {error}"
            ) from error
        seconds = tokens * economics.training_time(model, length, setting.machine).total
        lines.append(
            [
                name.upper(),
                f"{1e3 * seconds:.0f}",
                f"{step:.0f}",
                f"{1e5 * seconds / step - 100:+.1f} %",
            ]
        )
    return ["training step of configs/h100_350m.py", "model (ms)", "measured (ms)", ""], lines


def _where(found: Mapping[str, Model], share: Callable[[CostRow], float]) -> str:
    """For which models the estimate of attention's share holds, by length."""
    holds = []
    for index, estimate in enumerate(ESTIMATES):
        inside = [n for n, m in found.items() if _within(share(m.rows[index]), estimate.attention)]
        holds.append(
            f"at {short_length(estimate.length)} for {', '.join(inside) or 'none of them'}"
        )
    return "; ".join(holds)


def _extremes(found: Mapping[str, Model], share: Callable[[CostRow], float]) -> tuple[str, str]:
    shares = sorted((share(model.rows[0]), name) for name, model in found.items())
    low, high = (f"{100 * value:.0f} % ({name})" for value, name in (shares[0], shares[-1]))
    return low, high


def _within(value: float, span: Sequence[float]) -> bool:
    """As the estimate is written, to whole percents."""
    return span[0] <= round(value, 2) <= span[1]


def _bold(value: float, span: Sequence[float]) -> str:
    text = words.percent(value, 0)
    return f"**{text}**" if _within(value, span) else text


def _span(span: Range) -> str:
    return f"{100 * span[0]:.0f} to {100 * span[1]:.0f} %"
