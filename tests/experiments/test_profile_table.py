"""The table of a profile: per step, in both files, without this machine's paths."""

import json

import pytest

from experiments import cli, profile_table
from msa_jax.train.operation_times import DeviceTimes, OperationTime


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 8 steps, profiled from step 7 on: the window is cut off after two."""
    operations = [OperationTime("flash|attention", "custom-call.1", 48, 30.0, 0.6)]
    operations += [OperationTime(f"fusion_{n}", "", 2, 2.0, 0.04) for n in range(10)]
    times = DeviceTimes(operations, window_ms=100.0, busy_ms=95.0)
    monkeypatch.setattr(profile_table, "device_times", lambda _: times)
    folder = tmp_path / "msa"
    folder.mkdir()
    config = {"train": {"steps": 8, "profile_start": 7, "profile_steps": 3}}
    start = {"config": config, "devices": {"kind": "made up"}, "git": None}
    start["command"] = ["/here/bin/python", "/here/train.py", "--config=a.py", "--workdir=runs/msa"]
    (folder / "manifest.json").write_text(json.dumps({"starts": [{"config": None}, start]}))
    return folder


def test_the_longest_operations_by_step(run, tmp_path, capsys):
    output = tmp_path / "docs" / "profile"
    arguments = [f"--run={run}", f"--output={output}", "--top=2"]
    assert cli.run(profile_table.main, ["profile_table", *arguments]) == 0
    page = output.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out
    assert "2 steps from step 7, 50.0 ms each, devices busy 95.0%" in page
    assert "| `flash\\|attention` | `custom-call.1` | 48 | 15.00 | 60.0% |" in page
    assert "| all others |  |  |  | 36.0% |" in page
    table = json.loads(output.with_suffix(".json").read_text())
    assert [o["milliseconds_per_step"] for o in table["operations"]] == [15, 1]
    assert table["command"] == "python -m experiments.train --config=a.py --workdir=runs/msa"
    assert "/here" not in output.with_suffix(".json").read_text()


def test_a_run_without_a_profile_is_one_line(tmp_path, capsys):
    assert cli.run(profile_table.main, ["profile_table"]) == 2
    assert cli.run(profile_table.main, ["profile_table", f"--run={tmp_path}"]) == 2
    missing, trace = capsys.readouterr().err.splitlines()
    assert "--run is missing" in missing
    assert "no trace" in trace
