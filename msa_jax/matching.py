"""Sizes that make a comparison of two models fair: equal parameters, or equal training FLOPs.

Two models that differ in their mixer differ in its parameters and FLOPs too. `match` widens or
narrows one field of a config until it has as many as a reference, by the counts of `msa_jax.cost`,
and says what it did.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from msa_jax import cost
from msa_jax.config import ArchitectureConfig, ConfigError, require, require_choice

Quantity = Literal["flops", "params"]
Field = Literal["model.ffn_dim", "moe.expert_dim", "attention.window", "attention.top_k"]
QUANTITIES, FIELDS = get_args(Quantity), get_args(Field)

# Tiles of matrix units are 128 or 64 wide, and bf16 rows aligned from 8 on; smaller steps are for
# small models. A number of blocks has no such preference.
_STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
_LARGEST = 2**31


@dataclasses.dataclass(frozen=True)
class MatchReport:
    """What was matched, and how nearly. `str` says it in one line.

    Attributes:
      by: "params" (active parameters, embedding and head included) or "flops" (training FLOPs per
        token).
      length: tokens of a document, of "flops"; None otherwise.
      field: the field that was set.
      old: its value before.
      new: its value now.
      target: the reference's quantity.
      reached: the matched config's quantity.
    """

    by: str
    length: int | None
    field: str
    old: int
    new: int
    target: float
    reached: float

    @property
    def residual_percent(self) -> float:
        """By how much the matched config lies above the reference, in percent."""
        return 100 * (self.reached / self.target - 1)

    def __str__(self) -> str:
        return (
            f"{self.field} {self.old} -> {self.new}: {self.reached:,.0f} "
            f"{_words(self.by, self.length)}, the reference has {self.target:,.0f} "
            f"({self.residual_percent:+.2f} %)"
        )


@dataclasses.dataclass(frozen=True)
class Matched[T: ArchitectureConfig]:
    """The config with one field set, and what that matched."""

    config: T
    report: MatchReport


def match[T: ArchitectureConfig](
    config: T,
    reference: ArchitectureConfig,
    *,
    by: str,
    length: int | None = None,
    field: str | None = None,
    tolerance: float = 0.005,
) -> Matched[T]:
    """`config` with one size set so that it has as many parameters or FLOPs as `reference`.

    The size is a multiple of 128 where one comes within `tolerance`, else of 64, and so on.

    Args:
      config: what is to be compared, of any mixer.
      reference: what it is compared with.
      by: "params": active parameters, embedding and head included. "flops": training FLOPs per
        token of a document, attention included.
      length: tokens of that document; needed for "flops".
      field: what to set, by default the feed-forward's width: `moe.expert_dim` where layers have
        experts, else `model.ffn_dim`. `attention.window` and `attention.top_k` match FLOPs by what
        a query sees.
      tolerance: largest relative difference that counts as matched.

    Raises:
      ConfigError: no size of this field comes that near, or nothing depends on it.
    """
    require_choice("by", by, Quantity)
    tokens = length or 0
    require(by == "params" or tokens > 0, "length", length, 'by="flops" needs a number of tokens')
    field = field or _feed_forward_width(config)
    require_choice("field", field, Field)
    section, name = field.split(".")
    old = getattr(getattr(config, section), name)
    target = _quantity(reference, by, tokens)

    def reached(size: int) -> float:
        try:
            return _quantity(_with(config, field, size), by, tokens)
        except ConfigError:  # too small, such as a top_k that does not hold the forced blocks
            return -math.inf

    most = reached(_LARGEST)
    require(
        len({reached(1), reached(max(1, old // 2)), reached(old), most} - {-math.inf}) > 1,
        field,
        old,
        f"{_words(by, length)} do not depend on it: match by another field",
    )

    def off(size: int) -> float:
        return abs(reached(size) - target)

    crossing = _first(lambda size: reached(size) >= min(target, most))
    reports = [
        MatchReport(by, length, field, old, size, target, reached(size))
        for step in _steps(field)
        for size in sorted(_multiples_around(crossing, step), key=off)
    ]
    near = [report for report in reports if abs(report.residual_percent) <= 100 * tolerance]
    nearest = min(reports, key=lambda report: abs(report.residual_percent))
    require(bool(near), field, old, f"no size comes within {tolerance:.1%}; the nearest: {nearest}")
    return Matched(_with(config, field, near[0].new), near[0])


def _feed_forward_width(config: ArchitectureConfig) -> str:
    layers = range(config.model.num_layers)
    return "moe.expert_dim" if any(map(config.has_experts, layers)) else "model.ffn_dim"


def _with[T: ArchitectureConfig](config: T, field: str, size: int) -> T:
    section, name = field.split(".")
    part = dataclasses.replace(getattr(config, section), **{name: size})
    return dataclasses.replace(config, **{section: part})


def _quantity(config: ArchitectureConfig, by: str, length: int) -> float:
    if by == "params":
        return float(cost.parameter_count(config).active)
    return cost.training_flops(config, length).total / length


def _words(by: str, length: int | None) -> str:
    if by == "params":
        return "active parameters"
    return f"training FLOPs per token at {length:,} tokens"


def _first(holds: Callable[[int], bool]) -> int:
    """The least size from which on a condition holds that holds of the largest."""
    fails, size = 0, _LARGEST
    while size - fails > 1:
        middle = (fails + size) // 2
        fails, size = (fails, middle) if holds(middle) else (middle, size)
    return size


def _multiples_around(crossing: int, step: int) -> list[int]:
    """The last multiple below `crossing` and the one behind it; 0 is no size."""
    below = (crossing - 1) // step * step
    return [size for size in (below, below + step) if size > 0]


def _steps(field: str) -> tuple[int, ...]:
    return (1,) if field == "attention.top_k" else _STEPS
