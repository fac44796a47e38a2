"""The reference benchmark at toy size: every case is timed, and what it switched is put back."""

import json

from experiments import benchmark_reference, cli
from pallas_kernels import visibility


def test_every_case_is_timed(tmp_path, monkeypatch, capsys):
    for name, size in {"_BATCH": 1, "_LENGTH": 32, "_ROWS": 64, "_WIDTH": 8, "_INNER": 8}.items():
        monkeypatch.setattr(benchmark_reference, name, size)
    output = tmp_path / "timings.json"
    arguments = ["benchmark", "--repeats=2", f"--output={output}"]
    assert cli.run(benchmark_reference.main, arguments) == 0
    record = json.loads(output.read_text())
    cases = [timing["case"] for timing in record["timings"]]
    assert len(cases) == len(set(cases)) == 2 * 4 + 3
    assert all(timing["median_ms"] > 0 for timing in record["timings"])
    assert visibility.MAX_RANGES == 4
    assert "sparse_attention, 1 causal range" in capsys.readouterr().out


def test_a_wrong_flag_is_one_line(capsys):
    assert cli.run(benchmark_reference.main, ["benchmark", "--repeats=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
