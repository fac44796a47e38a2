"""The clock's sums and the utilisation from them, on a stopped clock."""

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


@pytest.fixture
def clock() -> StepClock:
    return StepClock(CONFIG, jax.devices()[:2])


def test_the_first_step_of_each_phase_is_compilation(clock):
    assert clock.add_step("warmup", LENGTH, 30.0, 100) is None
    assert clock.add_step("warmup", LENGTH, 2.0, 100) == 50.0
    assert clock.add_step("sparse", LENGTH, 20.0, 100) is None
    assert clock.add_step("sparse", LENGTH, 3.0, 80) == pytest.approx(80 / 3)
    assert clock.take("sparse", LENGTH) == {
        "clock/compile_seconds": 50.0,
        "clock/step_seconds": 2.5,
        "clock/tokens_per_second": 36.0,
    }


def test_taking_starts_afresh_without_compiling_again(clock):
    clock.add_step("sparse", LENGTH, 30.0, 100)
    clock.take("sparse", LENGTH)
    assert clock.take("sparse", LENGTH) == {}
    clock.add_step("sparse", LENGTH, 2.0, 100)
    assert clock.take("sparse", LENGTH) == {
        "clock/step_seconds": 2.0,
        "clock/tokens_per_second": 50.0,
    }


def test_measured_blocks_add_up(clock, monkeypatch):
    times = iter([1.0, 4.0, 10.0, 10.5])
    monkeypatch.setattr("msa_jax.train.clock.time.perf_counter", lambda: next(times))
    for _ in range(2):
        with clock.measure("checkpoint"):
            pass
    assert clock.take("sparse", LENGTH) == {"clock/checkpoint_seconds": 3.5}


@pytest.mark.parametrize("phase", ["warmup", "sparse"])
def test_utilisation_is_flops_over_the_peak_of_all_devices(clock, monkeypatch, phase):
    monkeypatch.setattr(utilisation, "peak_flops", lambda kind: 1e9)
    clock.add_step(phase, LENGTH, 1.0, 0)
    clock.add_step(phase, LENGTH, 2.0, 1000)
    fields = clock.take(phase, LENGTH)
    flops = cost.training_flops_per_token(CONFIG, LENGTH, phase=phase)
    assert fields["clock/mfu_sparse"] == pytest.approx(flops.sparse * 500 / 2e9)
    assert fields["clock/mfu_dense_equivalent"] == pytest.approx(flops.dense_equivalent * 500 / 2e9)
    assert (fields["clock/mfu_sparse"] < fields["clock/mfu_dense_equivalent"]) == (
        phase == "sparse"
    )


def test_memory_is_the_fullest_devices_peak(clock, monkeypatch):
    peaks = dict(zip(jax.devices()[:2], (5, 7), strict=True))
    monkeypatch.setattr("msa_jax.train.clock._peak_bytes", peaks.get)
    clock.add_step("sparse", LENGTH, 1.0, 100)
    assert "clock/peak_memory_bytes" not in clock.take(
        "sparse", LENGTH
    )  # nothing but compilation yet
    clock.add_step("sparse", LENGTH, 1.0, 100)
    assert clock.take("sparse", LENGTH)["clock/peak_memory_bytes"] == 7
