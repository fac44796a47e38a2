"""Rates between, at and beyond measured lengths."""

import dataclasses

import pytest

from msa_jax.config import ConfigError
from msa_jax.kernel_rates import KernelRates, RateCurve

CURVE = RateCurve((1000, 4000, 8000), (1e12, 4e12, 2e12))


def test_it_passes_through_what_was_measured():
    for length, rate in zip(CURVE.lengths, CURVE.rates, strict=True):
        assert CURVE.at(length) == pytest.approx(rate, rel=1e-12)


def test_between_it_is_the_power_law_of_the_neighbours():
    assert CURVE.at(2000) == pytest.approx(2e12, rel=1e-12)  # 1e12 * (N / 1000)
    assert CURVE.at(3000) == pytest.approx(3e12, rel=1e-12)
    assert CURVE.at(5000) == pytest.approx(4e12 * 4 / 5, rel=1e-12)  # 4e12 * (4000 / N)


def test_beyond_it_is_the_nearest_rate_and_says_so():
    assert CURVE.at(10) == pytest.approx(1e12)
    assert CURVE.at(9000) == pytest.approx(2e12)
    inside = [CURVE.covers(length) for length in (999, 1000, 4500, 8000, 8001)]
    assert inside == [False, True, True, True, False]


def test_kernels_cover_what_every_one_of_them_covers():
    short = RateCurve((1000, 2000), (1.0, 1.0))
    fields = [field.name for field in dataclasses.fields(KernelRates)]
    everywhere = KernelRates(**dict.fromkeys(fields, CURVE))
    assert everywhere.covers_prefill(3000)
    assert everywhere.covers_training(3000)
    prefill = {"dense_forward", "selection", "main"}
    for name in fields:
        rates = dataclasses.replace(everywhere, **{name: short})
        assert rates.covers_prefill(3000) == (name not in prefill)
        assert rates.covers_training(3000) == (name in prefill)
        assert rates.scaled(3.0).main.at(1000) == pytest.approx(3 * rates.main.at(1000))


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((), (), r"lengths=\(\): must hold a measured length"),
        ((2, 1), (1.0, 1.0), "must ascend"),
        ((1, 1), (1.0, 1.0), "must ascend"),
        ((1, 2), (1.0,), "a positive rate for every length"),
        ((1,), (0.0,), "a positive rate for every length"),
    ],
)
def test_what_is_no_curve_is_refused(lengths, rates, message):
    with pytest.raises(ConfigError, match=message):
        RateCurve(lengths, rates)
