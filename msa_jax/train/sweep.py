"""What a sweep is: parameters over config fields, objectives, and how points are chosen.

The files in `configs/sweeps/` return a `Sweep` from `get_sweep([argument])`; `experiments.sweep`
runs it. Fields are dotted names of `msa_jax.train.config.ExperimentConfig`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

from msa_jax.config import require, require_choice
from msa_jax.train.config import ExperimentConfig

SamplerName = Literal["grid", "random", "tpe", "nsga2"]
Direction = Literal["minimize", "maximize"]
ObjectiveName = Literal["validation_loss", "score_recall", "attention_flops", "tokens_per_second"]

type Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Choice:
    """A field that takes one of some values.

    Attributes:
      field: dotted name, such as "attention.top_k".
      values: in the order in which a grid goes through them and figures show them.
    """

    field: str
    values: tuple[Value, ...]

    def __post_init__(self):
        require(bool(self.field), "Choice.field", self.field, "name a config field")
        require(
            len(self.values) > 0 and len(set(map(repr, self.values))) == len(self.values),
            f"the values of {self.field}",
            self.values,
            "must be at least one, each of them once",
        )


@dataclasses.dataclass(frozen=True)
class IntRange:
    """A field that takes whole numbers from `low` to `high`, both included.

    Attributes:
      field: dotted name.
      low: the smallest.
      high: the largest.
      step: between neighbours; 1 where `log`.
      log: sampled uniformly in the logarithm.
    """

    field: str
    low: int
    high: int
    step: int = 1
    log: bool = False

    def __post_init__(self):
        require(self.step >= 1, f"the step of {self.field}", self.step, "must be >= 1")
        require(
            not self.log or self.step == 1,
            f"the step of {self.field}",
            self.step,
            "must be 1 where log",
        )
        _require_bounds(self.field, self.low, self.high, self.log)


@dataclasses.dataclass(frozen=True)
class FloatRange:
    """A field that takes real numbers from `low` to `high`.

    Attributes:
      field: dotted name.
      low: the smallest.
      high: the largest.
      log: sampled uniformly in the logarithm.
    """

    field: str
    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        _require_bounds(self.field, self.low, self.high, self.log)


type Parameter = Choice | IntRange | FloatRange


@dataclasses.dataclass(frozen=True)
class Condition:
    """Points that are not trained, beside those whose config is refused anyway.

    Attributes:
      reason: why, recorded with the trial.
      excludes: whether it is true of a point's config.
    """

    reason: str
    excludes: Callable[[ExperimentConfig], bool]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is compared.

    Attributes:
      name: "validation_loss" (final evaluation, nats per token), "score_recall" (final evaluation,
        mean over layers), "attention_flops" (forward, per token of a full row, projections
        excluded, by `msa_jax.cost`) or "tokens_per_second" (median of the training records).
      direction: "minimize" or "maximize".
    """

    name: ObjectiveName
    direction: Direction

    def __post_init__(self):
        require_choice("Objective.name", self.name, ObjectiveName)
        require_choice(f"the direction of {self.name}", self.direction, Direction)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One study.

    Attributes:
      config: the base, as `--config` takes it: "configs/quickstart.py" or "FILE.py:argument".
      parameters: fields that vary.
      objectives: what is compared; the first one orders tables and colours.
      sampler: "grid" (every combination, the last parameter fastest), "random", "tpe" (Bergstra et
        al. 2011) or "nsga2" (Deb et al. 2002).
      trials: points in all, those that cannot work among them; None, for a grid only, is all of it.
      seed: of the sampler; a trial's draw depends on it, the trial's number and those before.
      overrides: values of fields that differ from the base config and do not vary.
      conditions: points that are left out.
    """

    config: str
    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    sampler: SamplerName = "grid"
    trials: int | None = None
    seed: int = 0
    overrides: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def __post_init__(self):
        require_choice("sampler", self.sampler, SamplerName)
        for name, values in (
            ("parameters", [parameter.field for parameter in self.parameters]),
            ("objectives", [objective.name for objective in self.objectives]),
        ):
            require(len(values) > 0, name, (), "name at least one")
            require(len(set(values)) == len(values), name, values, "name each only once")
        for parameter in self.parameters:
            require(
                parameter.field not in self.overrides,
                f"overrides[{parameter.field!r}]",
                self.overrides.get(parameter.field),
                "is a parameter too: take it out of one of them",
            )
        require(
            self.trials is not None or self.sampler == "grid",
            "trials",
            self.trials,
            f'say how many points sampler="{self.sampler}" may try',
        )
        require(self.trials is None or self.trials >= 1, "trials", self.trials, "must be >= 1")
        if self.sampler == "grid":
            require(self.grid_size >= 1, "parameters", (), "a grid needs values")

    @property
    def grid_size(self) -> int:
        """Combinations of all values."""
        return math.prod(len(grid_values(parameter)) for parameter in self.parameters)

    @property
    def total_trials(self) -> int:
        """Points in all."""
        if self.sampler != "grid":
            return self.trials or 0
        return self.grid_size if self.trials is None else min(self.trials, self.grid_size)


def grid_values(parameter: Parameter) -> tuple[Value, ...]:
    """The values that a grid goes through.

    Raises:
      ConfigError: a range that has no natural list of values.
    """
    if isinstance(parameter, Choice):
        return parameter.values
    listed = isinstance(parameter, IntRange) and not parameter.log
    require(listed, f"the range of {parameter.field}", parameter, "in a grid, list it as a Choice")
    assert isinstance(parameter, IntRange)
    return tuple(range(parameter.low, parameter.high + 1, parameter.step))


def _require_bounds(field: str, low: int | float, high: int | float, log: bool) -> None:
    require(bool(field), "field", field, "name a config field")
    require(low <= high, f"the range of {field}", (low, high), "low must not be above high")
    require(not log or low > 0, f"the range of {field}", (low, high), "low must be > 0 where log")
