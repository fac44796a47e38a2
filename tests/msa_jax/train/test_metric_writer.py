"""Records survive the writer, a crash and a resume."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from msa_jax.train.metrics import MetricWriter, metrics_path, read_metrics


def write_run(workdir, steps, resume_step=-1):
    with MetricWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": jnp.float32(1) / step, "index_kl": [step, 0.5]})


def test_records_come_back_as_they_were(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(
            3,
            "validation",
            {
                "loss": jnp.float32(0.1),
                "steps": np.int32(7),
                "narrow": jnp.bfloat16(0.5),
                "load": jnp.arange(4.0).reshape(2, 2),
                "bad": jnp.array([jnp.nan, jnp.inf, -jnp.inf]),
            },
        )
    (record,) = read_metrics(metrics_path(tmp_path))
    bad = record.pop("bad")
    assert math.isnan(bad[0])
    assert bad[1:] == [math.inf, -math.inf]
    assert record == {
        "step": 3,
        "split": "validation",
        "loss": float(np.float32(0.1)),
        "steps": 7,
        "narrow": 0.5,
        "load": [[0.0, 1.0], [2.0, 3.0]],
    }


def test_every_line_is_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": math.nan, "norm": math.inf})
    json.loads(metrics_path(tmp_path).read_text(), parse_constant=refuse)


def test_a_record_is_in_the_file_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    assert len(read_metrics(metrics_path(tmp_path))) == 1
    writer.close()


def test_resume_cuts_what_comes_again_so_that_the_files_are_equal(tmp_path):
    write_run(tmp_path / "whole", range(1, 9))
    write_run(tmp_path / "parts", range(1, 7))
    write_run(tmp_path / "parts", range(5, 9), resume_step=4)
    whole, parts = (metrics_path(tmp_path / name).read_bytes() for name in ("whole", "parts"))
    assert parts == whole


def test_a_fresh_start_drops_the_records_of_a_run_without_checkpoint(tmp_path):
    write_run(tmp_path, range(1, 4))
    write_run(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(metrics_path(tmp_path))] == [1, 2]


def test_a_line_cut_by_a_crash_is_left_out_and_overwritten_on_resume(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = metrics_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_run(tmp_path, [3], resume_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    write_run(tmp_path, range(1, 4))
    path = metrics_path(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{oops\n" + lines[2])
    with pytest.raises(ValueError, match="line 2: not a JSON record"):
        read_metrics(path)


def board_scalars(workdir) -> dict[str, list[tuple[int, float]]]:
    """Scalars of all event files: each record is a length (8 bytes), a check, an Event, a check."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_tensorboard_holds_the_same_numbers(tmp_path):
    write_run(tmp_path, [1, 2])
    assert board_scalars(tmp_path) == {
        "train/loss": [(1, 1.0), (2, 0.5)],
        "train/index_kl/00": [(1, 1.0), (2, 2.0)],
        "train/index_kl/01": [(1, 0.5), (2, 0.5)],
    }
