"""What a sweep refuses, naming the field and the mend."""

import jaxtyping
import pytest

from msa_jax.config import ConfigError
from msa_jax.train.sweep import Choice, FloatRange, IntRange, Objective, Sweep, grid_values

LOSS = Objective("validation_loss", "minimize")
TOP_K = Choice("attention.top_k", (2, 4))


def make(**changes):
    options = {"config": "a.py", "parameters": (TOP_K,), "objectives": (LOSS,)}
    return Sweep(**options | changes)


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: make(sampler="best"), "sampler='best': choose one of 'grid'"),
        (lambda: Objective("loss", "minimize"), "name='loss': choose one of 'validation_loss'"),
        (lambda: Objective("score_recall", "up"), "score_recall='up': choose one of 'minimize'"),
        (lambda: make(parameters=()), r"parameters=\(\): name at least one"),
        (lambda: make(objectives=()), r"objectives=\(\): name at least one"),
        (lambda: make(parameters=(TOP_K, TOP_K)), "parameters=.*name each only once"),
        (lambda: make(objectives=(LOSS, LOSS)), "objectives=.*name each only once"),
        (lambda: make(overrides={"attention.top_k": 1}), "overrides.*is a parameter too"),
        (lambda: make(sampler="tpe"), "trials=None: say how many"),
        (lambda: make(trials=0), "trials=0: must be >= 1"),
        (lambda: make(parameters=(FloatRange("a", 0.1, 1.0),)), "in a grid, list it as a Choice"),
        (lambda: make(parameters=(IntRange("a", 1, 8, log=True),)), "list it as a Choice"),
        (lambda: Choice("a", ()), "the values of a="),
        (lambda: Choice("a", (1, 1)), "each of them once"),
        (lambda: Choice("", (1,)), "name a config field"),
        (lambda: IntRange("a", 3, 2), "low must not be above high"),
        (lambda: IntRange("a", 1, 8, step=0), "step of a=0: must be >= 1"),
        (lambda: IntRange("a", 1, 8, step=2, log=True), "step of a=2: must be 1 where log"),
        (lambda: FloatRange("a", 0.0, 1.0, log=True), "low must be > 0 where log"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch, make_one, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        make_one()


def test_equal_numbers_of_two_types_are_two_values():
    assert Choice("a", (1, True, "1")).values == (1, True, "1")


def test_a_grid_is_as_large_as_its_combinations():
    parameters = (TOP_K, IntRange("attention.block_size", 8, 32, step=8))
    assert grid_values(parameters[1]) == (8, 16, 24, 32)
    assert make(parameters=parameters).total_trials == 8
    assert make(parameters=parameters, trials=5).total_trials == 5
    assert make(parameters=parameters, trials=50).total_trials == 8
    assert make(parameters=parameters, trials=50, sampler="random").total_trials == 50
