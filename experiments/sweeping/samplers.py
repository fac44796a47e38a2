"""Samplers whose draw belongs to the trial's number, so that workers need not talk to each other.

Storages give every trial a number of its own. A grid takes its point from it, and the searches
their random seed: two workers never try one point of a grid twice, never draw the same random
numbers, and a study run again by one worker draws the same points.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from msa_jax.train.sweep import Choice, FloatRange, Parameter, Sweep, Value, grid_values


def make_sampler(sweep: Sweep) -> BaseSampler:
    """The sampler that the sweep names."""
    if sweep.sampler == "grid":
        return _GridByNumber(sweep)
    # Generations must be few enough to have descendants in a short study.
    population = min(50, max(4, sweep.total_trials // 5))
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "random": lambda seed: RandomSampler(seed=seed),
        "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True),
        "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=population),
    }
    return _SeededByNumber(makers[sweep.sampler], sweep.seed)


def suggest(trial: optuna.Trial, parameters: Sequence[Parameter]) -> dict[str, Value]:
    """The trial's point; what an earlier worker drew for it already stays."""
    point: dict[str, Any] = {}
    for parameter in parameters:
        name = parameter.field
        if isinstance(parameter, Choice):
            point[name] = trial.suggest_categorical(name, list(parameter.values))
        elif isinstance(parameter, FloatRange):
            low, high = parameter.low, parameter.high
            point[name] = trial.suggest_float(name, low, high, log=parameter.log)
        else:
            low, high, step = parameter.low, parameter.high, parameter.step
            point[name] = trial.suggest_int(name, low, high, step=step, log=parameter.log)
    return point


class _GridByNumber(BaseSampler):
    """Trial n gets the n-th combination."""

    def __init__(self, sweep: Sweep):
        self._names = [parameter.field for parameter in sweep.parameters]
        self._points = list(itertools.product(*map(grid_values, sweep.parameters)))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Value:
        return self._points[trial.number][self._names.index(param_name)]


class _SeededByNumber(BaseSampler):
    """A fresh sampler for each trial, seeded by its number; what it learns from is the storage."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self._make, self._seed = make, seed

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        return self._make(self._seed * 1_000_003 + trial.number)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._of(trial)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)
