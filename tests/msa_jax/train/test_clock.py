"""The clock's sums and the utilisation from them, in a time of the tests' own."""

import jax
import pytest

from msa_jax import cost, utilisation
from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig
from msa_jax.train.clock import StepClock

CONFIG = ArchitectureConfig(
    model=ModelConfig(d_model=64, num_layers=2, ffn_dim=64),
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32, rope_dim=8, top_k=2),
    moe=MoEConfig(num_experts=0),
)
LENGTH = 4096


class Time:
    """Stands still until a test lets it pass."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch) -> Time:
    time = Time()
    monkeypatch.setattr("msa_jax.train.clock.time.perf_counter", time)
    return time


@pytest.fixture
def clock(time) -> StepClock:
    return StepClock(CONFIG, jax.devices()[:2])


@pytest.fixture
def step(clock, time):
    """One step, alone: `step(phase, seconds, tokens)`."""

    def step(phase, seconds, tokens):
        clock.begin_step()
        time.now += seconds
        return clock.add_step(phase, LENGTH, tokens)

    return step


def test_the_first_step_of_each_phase_is_compilation(clock, step):
    assert step("warmup", 30.0, 100) is None
    assert step("warmup", 2.0, 100) == 50.0
    assert step("sparse", 20.0, 100) is None
    assert step("sparse", 3.0, 80) == pytest.approx(80 / 3)
    assert clock.take("sparse", LENGTH) == {
        "clock/compile_seconds": 50.0,
        "clock/step_seconds": 2.5,
        "clock/tokens_per_second": 36.0,
    }


def test_a_step_takes_the_time_since_the_last_one_was_over(clock, time, step):
    """Each is begun a second after the one before, and takes two by itself; then all is idle."""
    step("sparse", 9.0, 100)
    clock.begin_step()
    rates = []
    for number in range(3):
        time.now += 1.0
        if number < 2:
            clock.begin_step()
        time.now += 1.0
        rates.append(clock.add_step("sparse", LENGTH, 100))
    assert rates == [50.0, 50.0, 50.0]
    time.now += 60.0
    assert step("sparse", 4.0, 100) == 25.0


def test_another_length_is_another_program(clock, step):
    step("sparse", 30.0, 100)
    clock.begin_step()
    assert clock.add_step("sparse", LENGTH // 2, 100) is None


def test_taking_starts_afresh_without_compiling_again(clock, step):
    step("sparse", 30.0, 100)
    clock.take("sparse", LENGTH)
    assert clock.take("sparse", LENGTH) == {}
    step("sparse", 2.0, 100)
    assert clock.take("sparse", LENGTH) == {
        "clock/step_seconds": 2.0,
        "clock/tokens_per_second": 50.0,
    }


def test_measured_blocks_add_up(clock, time):
    for seconds in (3.0, 0.5):
        time.now += 10
        with clock.measure("checkpoint"):
            time.now += seconds
    assert clock.take("sparse", LENGTH) == {"clock/checkpoint_seconds": 3.5}


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_utilisation_is_flops_over_the_peak_of_all_devices(clock, step, monkeypatch, phase):
    monkeypatch.setattr(utilisation, "peak_flops", lambda kind: 1e9)
    step(phase, 1.0, 0)
    step(phase, 2.0, 1000)
    fields = clock.take(phase, LENGTH)
    flops = cost.training_flops_per_token(CONFIG, LENGTH, phase=phase)
    assert fields["clock/mfu_sparse"] == pytest.approx(flops.sparse * 500 / 2e9)
    assert fields["clock/mfu_dense_equivalent"] == pytest.approx(flops.dense_equivalent * 500 / 2e9)
    assert (fields["clock/mfu_sparse"] < fields["clock/mfu_dense_equivalent"]) == (
        phase == "sparse"
    )


def test_memory_is_the_fullest_devices_peak(clock, step, monkeypatch):
    peaks = dict(zip(jax.devices()[:2], (5, 7), strict=True))
    monkeypatch.setattr("msa_jax.train.clock._peak_bytes", peaks.get)
    step("sparse", 1.0, 100)
    # Nothing but compilation yet.
    assert "clock/peak_memory_bytes" not in clock.take("sparse", LENGTH)
    step("sparse", 1.0, 100)
    assert clock.take("sparse", LENGTH)["clock/peak_memory_bytes"] == 7
