"""From a sweep file and a command line to the command line and config of each point."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments import cli
from msa_jax.config import ConfigError
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.sweep import Choice, Parameter, Sweep, Value
from msa_jax.validation import ChoiceError


class ExcludedError(ValueError):
    """A point that is not to be trained; the message says why."""


@dataclasses.dataclass(frozen=True)
class Space:
    """A sweep with its base config read and all its fields checked.

    Attributes:
      sweep: as the file and the command line define it.
      base: the config that the points change.
      fixed: `--config.field=value` of what differs from the base file in every point.
    """

    sweep: Sweep
    base: ExperimentConfig
    fixed: tuple[str, ...]

    def arguments(self, point: Mapping[str, Value]) -> list[str]:
        """The command line of one point, for `experiments.train`, without a work directory."""
        return [f"--config={self.sweep.config}", *self.fixed, *_overrides(point)]

    def config(self, point: Mapping[str, Value]) -> ExperimentConfig:
        """The config of one point.

        Raises:
          ExcludedError: the config is refused, or a condition of the sweep excludes it.
        """
        try:
            config = _parse(self.arguments(point))
        except ConfigError as error:
            raise ExcludedError(" ".join(str(error).split())) from error
        for condition in self.sweep.conditions:
            if condition.excludes(config):
                raise ExcludedError(condition.reason)
        return config

    def definition(self) -> dict[str, Any]:
        """What all workers of a study must agree on, as JSON has it; how many trials is free."""
        sweep = self.sweep
        kinds = {
            parameter.field: {"kind": type(parameter).__name__, **dataclasses.asdict(parameter)}
            for parameter in sweep.parameters
        }
        record = {
            "sampler": sweep.sampler,
            "seed": sweep.seed,
            "objectives": {one.name: one.direction for one in sweep.objectives},
            "parameters": kinds,
            "conditions": [condition.reason for condition in sweep.conditions],
            "config": {
                field: value for field, value in _flat(self.base).items() if field not in kinds
            },
        }
        return json.loads(json.dumps(record))


def base_arguments(sweep: Sweep) -> list[str]:
    """The flags of the config that all points start from."""
    return [f"--config={sweep.config}", *_overrides(sweep.overrides)]


def make_space(sweep: Sweep, base: ExperimentConfig) -> Space:
    """Checks every field and value that the sweep names.

    Args:
      sweep: of the file.
      base: of `base_arguments` and what the command line changes.

    Raises:
      ChoiceError: a value that is none of its field's options.
      UsageError: a field that does not exist, a value of the wrong type, or a swept field that the
        command line sets.
    """
    untouched = _flat(_parse([f"--config={sweep.config}"]))
    changed = {field: value for field, value in _flat(base).items() if value != untouched[field]}
    for parameter in sweep.parameters:
        if parameter.field in changed:
            raise cli.UsageError(
                f"--config.{parameter.field}: the sweep varies this field; "
                "change its values in the sweep file"
            )
    space = Space(sweep, base, tuple(_overrides(changed)))
    for parameter in sweep.parameters:
        for value in _examples(parameter):
            try:
                _parse(space.arguments({parameter.field: value}))
            except ChoiceError:
                raise
            except ConfigError:
                continue  # Another parameter may make it work; else its points are pruned.
    return space


def _overrides(values: Mapping[str, Value]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in values.items()]


def _parse(arguments: Sequence[str]) -> ExperimentConfig:
    return cli.parse_with_config(["sweep", *arguments], _no_flags)[1]


def _no_flags(values: flags.FlagValues) -> None:
    """A point has a config and nothing else."""


def _examples(parameter: Parameter) -> Sequence[Value]:
    if isinstance(parameter, Choice):
        return parameter.values
    return (parameter.low, parameter.high)


def _flat(config: ExperimentConfig) -> dict[str, Value]:
    return {
        f"{section}.{field}": value
        for section, fields in dataclasses.asdict(config).items()
        for field, value in fields.items()
    }
