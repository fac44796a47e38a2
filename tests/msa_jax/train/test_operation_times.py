"""Operations by device time: a real trace of a CPU, and made-up traces of other devices."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from msa_jax.train.operation_times import TraceError, device_times

STEPS = 3


def test_a_loop_counts_less_than_what_runs_in_it(tmp_path):
    @jax.jit
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.sort(x, axis=0) * 0.9, None), x, length=4)
        return x.sum()

    x = jax.random.normal(jax.random.key(0), (400, 400))
    program(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(STEPS):
            program(x).block_until_ready()
    times = device_times(tmp_path)
    longest = times.operations[0]
    assert longest.name.startswith("sort")
    assert longest.calls % (4 * STEPS) == 0
    assert longest.share > 0.5
    (loop,) = (operation for operation in times.operations if operation.name.startswith("while"))
    assert loop.calls == STEPS
    assert loop.share < 0.2
    assert sum(operation.share for operation in times.operations) == pytest.approx(1)
    assert 0 < times.busy_ms <= times.window_ms


def event(name, start, duration, **stats):
    return types.SimpleNamespace(
        name=name, start_ns=start, duration_ns=duration, stats=stats.items()
    )


def trace_of(monkeypatch, tmp_path, planes):
    """A trace of {plane: {line: events}}; returns what is read of it."""
    (tmp_path / "host.xplane.pb").touch()
    made = [
        types.SimpleNamespace(
            name=plane,
            lines=[types.SimpleNamespace(name=name, events=es) for name, es in lines.items()],
        )
        for plane, lines in planes.items()
    ]
    reader = types.SimpleNamespace(from_file=lambda _: types.SimpleNamespace(planes=made))
    monkeypatch.setattr(jax.profiler, "ProfileData", reader)
    return device_times(tmp_path)


MS = 1e6


def test_a_gpus_streams_count_and_lines_made_from_them_do_not(monkeypatch, tmp_path):
    stream = [
        event("kernel_a", 0, 2 * MS, hlo_op="custom-call.1"),
        event("kernel_b", 2 * MS, 1 * MS, hlo_op="fusion.2"),
        event("kernel_a", 7 * MS, 3 * MS, hlo_op="custom-call.3"),
    ]
    planes = {
        "/device:GPU:0": {
            "Stream #18(Compute)": stream,
            "Stream #19(MemcpyD2D)": [event("copy", 1 * MS, 3 * MS)],
            "XLA Modules": [event("jit_step", 0, 10 * MS)],
            "XLA Ops": stream,
        },
        "/host:CPU": {"python": [event("PjitFunction(step)", 0, 50 * MS)]},
    }
    times = trace_of(monkeypatch, tmp_path, planes)
    found = [(o.name, o.hlo_op, o.calls, o.milliseconds) for o in times.operations]
    expected = [("kernel_a", "custom-call.3", 2, 5), ("copy", "", 1, 3)]
    assert found == [*expected, ("kernel_b", "fusion.2", 1, 1)]
    assert times.operations[0].share == pytest.approx(5 / 9)
    assert (times.window_ms, times.busy_ms) == (10, 7)


def test_two_devices_are_both_summed_and_busy_on_average(monkeypatch, tmp_path):
    planes = {
        "/device:TPU:0": {"XLA Ops": [event("fusion", 0, 4 * MS)], "Steps": [event("1", 0, 9e9)]},
        "/device:TPU:1": {"XLA Ops": [event("fusion", 2 * MS, 2 * MS)]},
    }
    times = trace_of(monkeypatch, tmp_path, planes)
    assert [(o.calls, o.milliseconds) for o in times.operations] == [(2, 6)]
    assert (times.window_ms, times.busy_ms) == (4, 3)


def test_a_folder_without_a_trace_or_operations_says_so(monkeypatch, tmp_path):
    with pytest.raises(TraceError, match=r"no trace .*train\.profile_steps"):
        device_times(tmp_path / "profile")
    with pytest.raises(TraceError, match="no device ran"):
        trace_of(monkeypatch, pathlib.Path(tmp_path), {"/device:GPU:0": {"Steps": []}})
