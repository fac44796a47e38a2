"""The benchmark of training: a tiny layer on the references, its oracle, work and report."""

import concurrent.futures
import dataclasses
import functools
import json

import numpy as np
import pytest

from experiments import benchmark, cli
from experiments.benchmarking import (
    checks,
    provenance,
    report,
    results,
    runner,
    summary,
    timing,
    training_worker,
    work,
    worker,
)
from experiments.benchmarking.cases import MARK, Case
from msa_jax.cost import training_flops
from msa_jax.train.config import ExperimentConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Case(
    "msa",
    72,
    selections=("random",),
    precisions=("native",),
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    index_dim=16,
    block_size=8,
    top_k=4,
    implementation="",
    repeats=2,
    sampled_rows=24,
    passes="training",
)


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """All cases are the same one."""
    begin = training_worker.begin_compiling

    @functools.cache
    def compiled(case):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return begin(case, pool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "CHAIN_SECONDS", 0.001)
        patch.setattr("pallas_kernels.dispatch._reported", set())  # each line is logged once
        patch.setattr(training_worker, "begin_compiling", lambda case, _: compiled(case))
        yield


@pytest.fixture(scope="module")
def record():
    (record,) = training_worker.msa_training(TINY)
    return record


class TestWorker:
    def test_all_parts_are_timed_and_all_gradients_held_to_the_oracle(self, record):
        assert "error" not in record
        assert set(record["timings"]) == set(results.TRAINING_PARTS)
        errors = {name: e for name, e in record["checks"].items() if name.endswith("_error")}
        gradients = {f"d{name}_error" for name in ("q", "k", "v", "index_q", "index_k")}
        assert set(errors) == gradients | {"output_error", "lse_error", "kl_error"}
        assert max(errors.values()) < 5e-3
        assert record["checks"]["two_runs_equal"]
        assert any("index_kl runs as" in line for line in record["ops"])
        json.dumps(record)

    @pytest.mark.parametrize("name", ["q", "k", "v", "index_q", "index_k"])
    def test_a_wrong_gradient_is_not_timed(self, name, monkeypatch):
        train = training_worker._Inputs.train

        def spoilt(given, programs):
            layer = train(given, programs)
            wrong = {name: getattr(layer.gradients, name) * 1.03}
            return layer._replace(gradients=layer.gradients._replace(**wrong))

        monkeypatch.setattr(training_worker._Inputs, "train", spoilt)
        (record,) = training_worker.msa_training(TINY)
        assert f"off the exact gradients: d{name} 0.03" in record["error"]
        assert "timings" not in record

    def test_runs_that_differ_are_not_timed(self, monkeypatch):
        digests = iter(range(100))
        monkeypatch.setattr(checks, "digest", lambda _: next(digests))
        (record,) = training_worker.msa_training(TINY)
        assert record["error"] == "CheckError: two runs over the same inputs differ"

    def test_the_process_runs_the_passes_of_its_case(self, monkeypatch, capsys):
        monkeypatch.setattr(training_worker, "msa_training", lambda case: [{"passes": case.passes}])
        worker.main(["worker", json.dumps(dataclasses.asdict(TINY))])
        assert capsys.readouterr().out == f'{MARK}{{"passes": "training"}}\n'


class TestWork:
    def test_the_parts_add_up_to_what_the_models_cost_counts(self):
        """Two products for each of the forward pass's, and the KL's two."""
        case = dataclasses.replace(TINY, length=4096, block_size=128, top_k=4)
        config = dataclasses.replace(ExperimentConfig(), attention=case.attention)
        one_layer = dataclasses.replace(config.model, num_layers=1)
        flops = training_flops(dataclasses.replace(config, model=one_layer), 4096)
        whole = work.work(case, "training")
        assert whole.flops == flops.attention + flops.index_scores
        parts = [work.work(case, part) for part in ("selection", "main", "backward", "kl")]
        assert whole == sum(parts, start=work.Work(0, 0))
        dense = work.work(dataclasses.replace(case, subject="cudnn"), "training")
        forward = work.work(dataclasses.replace(case, subject="cudnn", passes="forward"), "both")
        assert dense.flops == 3 * forward.flops

    def test_bytes_of_the_backward_pass_and_the_kl(self):
        case, word, half = TINY, 4, 2
        heads, groups, ids = 4 * 16 * half, 2 * 16 * half, 2 * 4 * word
        backward = 4 * (heads + groups) + 4 * word + ids
        assert work.work(case, "backward").bytes == 72 * backward
        index = (2 + 1) * 16 * half
        kl = heads + groups + 2 * index + 4 * word + 2 * 2 * word + ids
        assert work.work(case, "kl").bytes == 72 * kl


def stored_run():
    def timings(**milliseconds):
        return {n: timing.summarise([ms / 1e3] * 5, 3).asdict() for n, ms in milliseconds.items()}

    def stored(subject, passes, **rest):
        case = dataclasses.asdict(Case(subject, 32768, passes=passes))
        return {"case": case, "peak_bytes": 5 * 10**9, **rest}

    names = ("output", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")
    checked = {f"{name}_error": 2e-3 for name in names} | {"selection_recall": 1.0}
    parts = {"selection": 1, "main": 8, "backward": 16, "kl": 5, "training": 29}
    shared = {"selection": "random", "precision": "native", "union": {"4": 40.0, "8": 60.0}}
    msa = {"timings": timings(**parts), "checks": checked, "ops": ["index_kl runs as 'made up'"]}
    records = [
        {"case": dataclasses.asdict(Case("ceilings")), "matmul_flops": 8e14, "copy_bytes": 3e12},
        stored("msa", "training", **shared, **msa, temporary_bytes={"training": 3 * 10**9}),
        stored("cudnn", "forward", timings=timings(both=29)),
        stored("cudnn", "training", timings=timings(training=116)),
        stored("flash_msa", "training", error="exit code 3"),
    ]
    environment = {"gpu": {"name": "H100"}, "python": "3", "packages": {}, "command": "c"}
    environment |= {"commit": "abc", "date": "2026-01-01", "method": "m"}
    return {"environment": environment, "records": records}


class TestReport:
    def test_speedups_are_over_the_same_passes(self):
        rows = results.rows([stored_run()])
        (row,) = (row for row in rows if row.case.subject == "msa")
        assert summary.speedups(row, rows) == {"cudnn": summary.Speedup(4.0)}
        parts = row.parts
        floors = [parts[name].floor_ms for name in ("selection", "main", "backward", "kl")]
        assert parts["training"].floor_ms == pytest.approx(np.sum(floors))

    def test_the_page_has_tables_of_training_beside_the_forward_ones(self, tmp_path):
        run = stored_run()
        assert results.failures([run]) == ["flash-msa at 32768 tokens, training: exit code 3"]
        report.write([run], tmp_path / "h100")
        page = (tmp_path / "h100.md").read_text()
        assert "| 32K | random | bf16 | 1.00 | 8.00 | 16.0 | 5.00 | 29.0 | 29.0 to 29.0 |" in page
        assert "| 5.0 | 3.0 | 4.00 | - | - |" in page
        assert "* index_kl runs as 'made up'" in page
        assert "## Training: baselines\n" in page
        assert "## Baselines\n" in page
        assert "## Time and speed-up" not in page
        assert "(h100_training.svg)" in page
        assert "forward, backward and KL" in (tmp_path / "h100_training.svg").read_text()

    def test_the_flag_makes_cases_that_take_the_default_implementation(self, monkeypatch, tmp_path):
        given = []

        def run(cases, output, environment, **_):
            given.extend(cases)
            lines = [{"environment": environment}, *stored_run()["records"]]
            output.write_text("\n".join(map(json.dumps, lines)))

        monkeypatch.setattr(provenance, "gpu", lambda: {"name": "H100", "compute_cap": "9.0"})
        monkeypatch.setattr(runner, "run", run)
        flags = ["--passes=training", "--lengths=1K", f"--output={tmp_path / 'h100'}"]
        cli.run(benchmark.main, ["benchmark", *flags])
        assert {(case.passes, case.implementation) for case in given} == {("training", "")}
        given.clear()
        cli.run(benchmark.main, ["benchmark", *flags[1:]])
        assert {(case.passes, case.implementation) for case in given} == {("forward", "mosaic_gpu")}
        assert cli.run(benchmark.main, ["benchmark", "--passes=backward"]) == 2
