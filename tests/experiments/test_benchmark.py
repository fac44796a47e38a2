"""The GPU benchmark's parts that need no GPU, and its jax cases at toy size on the references."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark, cli
from experiments.benchmarking import (
    checks,
    correlated,
    exact_rows,
    inputs,
    msa_worker,
    provenance,
    report,
    results,
    runner,
    summary,
    timing,
    work,
    worker,
)
from experiments.benchmarking.cases import PHASE, Case, plan
from pallas_kernels import dense_attention, select_blocks, sparse_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "index_dim": 16,
    "block_size": 16,
    "top_k": 4,
    "implementation": "reference",
    "repeats": 2,
    "sampled_rows": 24,
}


def tiny(length=256, **fields):
    return Case("msa", length, **TINY | fields)


class TestPlan:
    def test_dense_baselines_stop_at_their_longest_length(self):
        cases = plan(
            [2048, 1024], ["random"], ["native"], ["cudnn", "flash_msa"], skip_dense_above=1024
        )
        assert [(case.subject, case.length) for case in cases] == [
            ("ceilings", 0),
            ("msa", 1024),
            ("cudnn", 1024),
            ("flash_msa", 1024),
            ("msa", 2048),
            ("flash_msa", 2048),
        ]

    def test_a_case_survives_json(self):
        case = tiny(selections=("random",), precisions=("native", "int8"), seed=3)
        assert Case.from_json(json.loads(json.dumps(dataclasses.asdict(case)))) == case


class TestTiming:
    def test_short_calls_are_chained_and_long_ones_are_not(self):
        made = []

        def chain(seconds):
            def run(calls):
                made.append(calls)
                return calls * seconds

            return run

        short = timing.repeat(chain(0.005), 5)
        assert (short.calls, short.repeats) == (20, 5)
        assert short.median_ms == pytest.approx(5)
        long = timing.repeat(chain(1.0), 5)
        assert (long.calls, long.repeats) == (1, 3)
        made.clear()
        # A minute is more than repeating may take: the one call made is the measurement.
        longest = timing.repeat(chain(60.0), 5)
        assert made == [1]
        assert (longest.repeats, longest.median_ms) == (1, 60e3)

    def test_the_spread_is_that_of_the_chains(self):
        found = timing.summarise([3e-3, 1e-3, 2e-3, 5e-3, 4e-3], calls=7)
        assert (found.median_ms, found.min_ms, found.max_ms) == pytest.approx((3, 1, 5))
        assert found.iqr_ms == pytest.approx(3)


@pytest.fixture(scope="module")
def unions():
    """Mean distinct blocks of 4 neighbours by kind of selection."""
    case = tiny(1024, block_size=8)
    found = {}
    for kind in ("random", "identical", "correlated"):
        index = inputs.index_inputs(case, kind, jnp.float32)
        ids = select_blocks(*index, block_size=8, top_k=4).block_ids
        found[kind] = inputs.mean_union(ids, 4, first=512)
    return found


class TestInputs:
    def test_kinds_overlap_as_they_say(self, unions):
        assert unions["identical"] == 4
        assert unions["correlated"] == pytest.approx(4 * correlated.REPORTED_OVERLAP, rel=0.1)
        assert unions["random"] > 9

    def test_the_union_counts_distinct_blocks_of_windows(self):
        ids = np.array([[0, -1], [0, 1], [2, 3], [3, 4], [3, 4], [3, 4], [3, 4], [3, 5]])
        assert inputs.mean_union(ids[None, None], 4, first=0) == (5 + 3) / 2
        assert inputs.mean_union(ids[None, None], 4, first=1) == 3
        assert math.isnan(inputs.mean_union(ids[None, None], 16, first=0))

    def test_inputs_differ_by_seed_and_are_standard_normal(self):
        first, other = (inputs.main_inputs(tiny(seed=seed)) for seed in (1, 2))
        assert first.q.shape == (1, 256, 4, 16)
        assert first.k.shape == first.v.shape == (1, 256, 2, 16)
        assert (first.q == other.q).mean() < 0.1
        assert (first.k == first.v).mean() < 0.1
        assert abs(float(first.q.astype(jnp.float32).std()) - 1) < 0.02

    def test_captured_inputs_are_repeated_to_the_length(self, tmp_path):
        path = tmp_path / "captured.npz"
        index_q = np.random.default_rng(0).normal(size=(100, 2, 16)).astype(np.float32)
        np.savez(path, index_q=index_q, index_k=index_q[:, 0])
        case = tiny(inputs=str(path))
        index = inputs.index_inputs(case, "captured", jnp.float32)
        np.testing.assert_array_equal(index.index_q[0, 100:200], index_q)
        assert index.index_k.shape == (1, 256, 16)
        with pytest.raises(ValueError, match=r"index_q is .*set --kv_heads"):
            inputs.index_inputs(tiny(inputs=str(path), num_kv_heads=4), "captured")
        with pytest.raises(ValueError, match=r"needs --inputs"):
            inputs.index_inputs(tiny(), "captured")


@pytest.fixture(scope="module")
def sampled():
    """A case's rows, ids, scores, outputs and what the oracle expects."""
    case = tiny(200)
    index = inputs.index_inputs(case, "random", jnp.float32)
    arrays = inputs.main_inputs(case, jnp.float32)
    selection = select_blocks(*index, block_size=16, top_k=4, implementation="reference")
    o, lse = sparse_attention(*arrays, selection, implementation="reference")
    rows = exact_rows.sample_rows(case)
    ids = np.asarray(selection.block_ids[0][:, rows]).swapaxes(0, 1)
    scores = exact_rows.block_scores(*index, rows, 16)
    expected = exact_rows.attention(*arrays, ids, rows, 16)
    return (
        case,
        rows,
        ids,
        scores,
        np.asarray(o[0, rows]),
        np.asarray(lse[0][:, rows].T),
        expected,
    )


class TestChecks:
    def test_rows_are_distinct_and_hold_the_edges(self):
        rows = exact_rows.sample_rows(tiny(200))
        assert len(rows) == len(set(rows)) == 24
        assert {0, 1, 15, 16, 184, 199} <= set(rows)
        assert exact_rows.sample_rows(tiny(8)).tolist() == list(range(8))

    def test_the_references_pass(self, sampled):
        _, rows, ids, scores, o, lse, expected = sampled
        found = checks.check_selection(ids, scores, rows, 16, exact=True)
        assert found["selection_recall"] == 1
        error = checks.check_output(o, lse, expected)
        assert error["output_error"] < 1e-5
        assert error["lse_error"] < 1e-5

    def test_the_exact_choice_is_the_reference_selection(self, sampled):
        case, rows, ids, scores, *_ = sampled
        np.testing.assert_array_equal(exact_rows.choice(scores, rows, case), ids)

    def test_the_oracle_over_all_blocks_is_dense_attention(self):
        arrays = inputs.main_inputs(tiny(100), jnp.float32)
        rows = np.array([0, 17, 99])
        ids = np.broadcast_to(np.arange(7), (3, 2, 7))  # blocks in the future are masked
        o, lse = exact_rows.attention(*arrays, ids, rows, 16)
        dense, dense_lse = dense_attention(*arrays, return_lse=True, implementation="reference")
        np.testing.assert_allclose(o, dense[0, rows], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse, dense_lse[0][:, rows].T, rtol=1e-5)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda chosen: chosen[[1, 0, 2, 3]],  # not ascending
            lambda chosen: np.array([*chosen[:3], chosen[3] + 1]),  # the future
            lambda chosen: np.array([*chosen[1:], -1]),  # one too few
            lambda chosen: np.array([chosen[0], chosen[0], *chosen[2:]]),  # twice
        ],
    )
    def test_a_wrong_form_is_refused(self, sampled, spoil):
        _, rows, ids, scores, *_ = sampled
        wrong = ids.copy()
        wrong[-1, 0] = spoil(wrong[-1, 0])
        with pytest.raises(checks.CheckError, match=r"query 199, group 0 selected"):
            checks.check_selection(wrong, scores, rows, 16, exact=False)

    def test_a_worse_block_is_refused_unless_the_index_is_inexact(self, sampled):
        _, rows, ids, scores, *_ = sampled
        wrong = ids.copy()
        worst = int(scores[-1, 0, :12].argmin())
        kept = wrong[-1, 0, :3]
        best = kept[np.argsort(scores[-1, 0, kept])[1:]]
        wrong[-1, 0, :3] = sorted([*best, worst])
        with pytest.raises(checks.CheckError, match="below the exact choice"):
            checks.check_selection(wrong, scores, rows, 16, exact=True)
        found = checks.check_selection(wrong, scores, rows, 16, exact=False)
        assert found["selection_recall"] < 1
        assert found["selection_gap"] > checks.SCORE_GAP

    @pytest.mark.parametrize("value", [math.nan, 3.0])
    def test_a_wrong_or_missing_output_is_refused(self, sampled, value):
        *_, o, lse, expected = sampled
        wrong = o.copy()
        wrong[5, 0, 0] = value
        with pytest.raises(checks.CheckError, match="off the oracle"):
            checks.check_output(wrong, lse, expected)
        with pytest.raises(checks.CheckError, match="off the oracle"):
            checks.check_output(o, lse + 0.01, expected)

    def test_the_digest_sees_one_bit_and_its_place(self):
        x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4), jnp.bfloat16)
        assert checks.digest(x) == checks.digest(x.copy())
        assert checks.digest(x) != checks.digest(x.at[0, 3, 1, 2].mul(1.01))
        assert checks.digest(x) != checks.digest(x[:, ::-1])


@pytest.fixture(scope="module")
def records():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "CHAIN_SECONDS", 0.001)
        case = tiny(128, selections=("random",), precisions=("native", "no such"))
        return list(msa_worker.msa(case))


class TestWorkers:
    def test_msa_is_checked_and_timed(self, records):
        record = records[0]
        assert set(record["timings"]) == set(results.PARTS)
        assert all(part["median_ms"] > 0 for part in record["timings"].values())
        assert record["checks"]["two_runs_equal"]
        assert record["checks"]["rows"] == 24
        assert 4 <= record["union"]["4"] <= 16
        json.dumps(record)

    def test_another_selection_compiles_only_its_inputs(self, monkeypatch):
        monkeypatch.setattr(timing, "CHAIN_SECONDS", 0.001)
        compiled = []

        def listen(event, *_, **__):
            if event.endswith("backend_compile_duration"):
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            case = tiny(96, selections=("random", "identical"), precisions=("native", "int8"))
            counts = [len(compiled) for _ in msa_worker.msa(case)]
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert counts[0] >= 5  # main, and two programs by precision
        assert counts[1] == counts[0]
        assert counts[2] <= counts[0] + 4
        assert counts[3] == counts[2]

    def test_a_kind_that_fails_leaves_its_error_and_the_others(self, records):
        assert records[1]["precision"] == "no such"
        assert records[1]["error"].startswith("ValueError: index_precision")
        assert "timings" not in records[1]

    def test_a_result_that_fails_its_check_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(checks, "OUTPUT_ERROR", 0.0)
        (record,) = msa_worker.msa(tiny(64, selections=("random",), precisions=("native",)))
        assert record["error"].startswith("CheckError")
        assert "timings" not in record

    def test_runs_that_differ_are_not_timed(self, monkeypatch):
        digests = iter((1, 2))
        monkeypatch.setattr(checks, "digest", lambda _: next(digests))
        (record,) = msa_worker.msa(tiny(64, selections=("random",), precisions=("native",)))
        assert record["error"] == "CheckError: two runs over the same inputs differ"

    def test_the_process_reports_a_case_that_cannot_run(self, capsys):
        case = json.dumps(
            {"subject": "flash_attention_4", "length": 128, "selections": [], "precisions": []}
        )
        with pytest.raises(ModuleNotFoundError):
            worker.main(["worker", case])
        *said, line = capsys.readouterr().out.splitlines()
        assert said == [f"{PHASE}import flash_attn.cute"]
        assert "ModuleNotFoundError" in json.loads(line.removeprefix(worker.MARK))["error"]


class TestRunner:
    def run(self, monkeypatch, tmp_path, script, case=None, **limits):
        """Runs one case whose process is a script."""
        program = tmp_path / "fake_python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(runner.sys, "executable", str(program))
        output, lines = tmp_path / "out.jsonl", []
        limits = {"case_seconds": 30, "total_seconds": 30} | limits
        runner.run([case or tiny()], output, {"gpu": None}, report=lines.append, **limits)
        return [json.loads(line) for line in output.read_text().splitlines()], lines

    def test_records_are_kept_as_they_come(self, monkeypatch, tmp_path):
        script = f"""echo noise; echo '{worker.MARK}{{"a": 1}}'; echo '{worker.MARK}{{"a": 2}}'"""
        lines, said = self.run(monkeypatch, tmp_path, script)
        assert lines[0] == {"environment": {"gpu": None}}
        assert [line["a"] for line in lines[1:]] == [1, 2]
        assert Case.from_json(lines[1]["case"]) == tiny()
        assert said[0].startswith("msa at 256 tokens: ")

    def test_a_crash_keeps_what_came_before_and_says_why(self, monkeypatch, tmp_path):
        script = f"""echo '{worker.MARK}{{"a": 1}}'; echo Killed by me >&2; exit 3"""
        lines, said = self.run(monkeypatch, tmp_path, script)
        assert lines[1]["a"] == 1
        assert lines[2]["error"] == "exit code 3, in its phase 'start': Killed by me"
        assert "exit code 3" in said[0]

    def test_a_hang_is_ended_and_says_what_it_was_doing(self, monkeypatch, tmp_path, capsys):
        script = f"echo '{PHASE}draw a'; echo '{PHASE}compile b'; exec sleep 20"
        lines, _ = self.run(monkeypatch, tmp_path, script, case_seconds=0.5)
        assert lines[1]["error"] == "ended after 0 s, in its phase 'compile b'"
        assert list(lines[1]["phases"]) == ["start", "draw a", "compile b"]
        assert lines[1]["phases"]["compile b"] > 0.1
        assert capsys.readouterr().err.endswith(" s compile b\n")

    def test_each_record_has_its_own_phases(self, monkeypatch, tmp_path):
        record = f"echo '{worker.MARK}{{}}'"
        script = f"echo '{PHASE}one'; {record}; echo '{PHASE}two'; sleep 0.2; {record}"
        lines, _ = self.run(monkeypatch, tmp_path, script)
        first, second = (line["phases"] for line in lines[1:])
        assert list(first) == ["start", "one"]
        assert list(second) == ["one", "two"]
        assert second["two"] >= 0.1  # its first line is read somewhat late on a busy machine

    def test_flash_msa_has_longer_to_compile(self, monkeypatch, tmp_path):
        case = Case("flash_msa", 128)
        script = f"""sleep 0.5; echo '{worker.MARK}{{"a": 1}}'"""
        lines, said = self.run(monkeypatch, tmp_path, script, case=case, case_seconds=0.1)
        assert lines[1]["a"] == 1
        assert said[0].startswith("flash-msa at 128 tokens: ")

    def test_only_msa_runs_without_triton_products(self, monkeypatch, tmp_path):
        script = f"""echo "{worker.MARK}{{\\"flags\\": \\"$XLA_FLAGS\\"}}\""""
        monkeypatch.setenv("XLA_FLAGS", "--mine")
        for case, flags in (
            (tiny(), "--mine --xla_gpu_enable_triton_gemm=false"),
            (Case("ceilings"), "--mine"),
        ):
            lines, _ = self.run(monkeypatch, tmp_path, script, case=case)
            assert lines[-1]["flags"] == flags

    def test_no_case_begins_when_the_time_is_over(self, monkeypatch, tmp_path):
        lines, _ = self.run(monkeypatch, tmp_path, "exit 3", total_seconds=0)
        assert lines[1]["error"] == "not run: the run's time was over"


def timings(**milliseconds):
    return {
        name: timing.summarise([ms / 1e3] * 5, calls=3).asdict()
        for name, ms in milliseconds.items()
    }


def stored_run():
    """A made-up run: MSA at 8K and 32K, cuDNN at 8K alone, flash-msa, and a failure."""

    def record(subject, length, **rest):
        return {"case": dataclasses.asdict(Case(subject, length)), "peak_bytes": 10**9, **rest}

    checked = {
        "selection_recall": 1.0,
        "selection_gap": 1e-6,
        "output_error": 2e-3,
        "error_of_selection": 2e-3,
    }
    shared = {
        "selection": "random",
        "precision": "native",
        "checks": checked,
        "union": {"4": 40.0, "8": 60.0},
        "temporary_bytes": {"both": 10**8},
    }
    records = [
        record("ceilings", 0, matmul_flops=800e12, copy_bytes=3e12),
        record("msa", 8192, timings=timings(selection=0.3, main=1.7, both=2.0), **shared),
        record("cudnn", 8192, timings=timings(both=4.0)),
        record("flash_msa", 8192, timings=timings(both=16.0, selection=0.5)),
        record("msa", 32768, timings=timings(selection=1.0, main=7.0, both=8.0), **shared),
        record("msa", 32768, **shared | {"precision": "int8"}, error="CheckError: off"),
    ]
    environment = {
        "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver_version": "1"},
        "python": "3.12",
        "packages": {"jax": "0.11.2", "torch": None},
        "command": "python -m experiments.benchmark",
        "commit": "abc",
        "date": "2026-01-01",
        "method": "chained calls",
    }
    return {"environment": environment, "records": records}


class TestResults:
    def test_work_is_that_of_the_definition(self):
        case = Case("msa", 1024, num_heads=8, num_kv_heads=2, head_dim=64, index_dim=32)
        pairs = 1024 * 1025 // 2  # 8 blocks, all of them selected
        selection, main = work.work(case, "selection"), work.work(case, "main")
        assert selection.flops == 2 * 32 * 2 * pairs
        assert selection.bytes == 1024 * (2 * 32 * 2 + 32 * 2 + 2 * 16 * 4)
        assert main.flops == 4 * 8 * 64 * pairs
        rows = 8 * (2 * 64 * 2 + 4) + 2 * (2 * 64 * 2 + 16 * 4)
        assert main.bytes == 1024 * rows
        assert work.work(case, "both") == selection + main
        dense = work.work(Case("cudnn", 1024, num_heads=8, num_kv_heads=2, head_dim=64), "both")
        assert dense.flops == main.flops
        assert dense.bytes == 1024 * 2 * (8 + 2) * 64 * 2

    def test_a_floor_is_the_larger_of_compute_and_traffic(self):
        rates = work.Ceilings(matmul_flops=1e12, copy_bytes=1e9)
        assert rates.floor_ms(work.Work(2 * 10**12, 10**9)) == 2e3
        assert rates.floor_ms(work.Work(2 * 10**12, 10**9), eight_bit=True) == 1e3
        assert rates.floor_ms(work.Work(10**12, 3 * 10**9)) == 3e3

    def test_an_8_bit_index_halves_the_selections_floor_alone(self):
        run = stored_run()
        run["records"][5] = run["records"][4] | {"precision": "int8"}
        exact, eight_bit = (row.parts for row in results.rows([run]) if row.case.length == 32768)
        assert eight_bit["selection"].floor_ms == pytest.approx(exact["selection"].floor_ms / 2)
        assert eight_bit["main"].floor_ms == exact["main"].floor_ms
        for parts in (exact, eight_bit):
            floors = parts["selection"].floor_ms + parts["main"].floor_ms
            assert parts["both"].floor_ms == pytest.approx(floors)

    def test_speedups_are_measured_or_said_to_be_extrapolated(self):
        rows = results.rows([stored_run()])
        short, long = (row for row in rows if row.case.subject == "msa")
        assert summary.speedups(short, rows) == {
            "cudnn": summary.Speedup(2.0),
            "flash_msa": summary.Speedup(8.0),
        }
        # 4 ms at 8K is 64 ms at 32K; flash-msa is not extrapolated.
        assert summary.speedups(long, rows) == {"cudnn": summary.Speedup(8.0, 8192)}

    def test_rates(self):
        (row, *_) = (r for r in results.rows([stored_run()]) if r.case.subject == "cudnn")
        part = row.parts["both"]
        flops = 4 * 64 * 128 * 8192 * 8193 / 2
        assert part.teraflops == pytest.approx(flops / 4e-3 / 1e12)
        assert part.share == pytest.approx(flops / 800e12 / 4e-3)

    def test_a_later_run_replaces_a_case_and_mends_a_failure(self):
        first = stored_run()
        assert results.failures([first]) == ["msa at 32768 tokens random int8: CheckError: off"]
        again = stored_run()
        again["records"] = [again["records"][4] | {"precision": "int8"}]
        assert results.failures([first, again]) == []
        again["records"][0]["timings"] = timings(selection=1.0, main=3.0, both=5.0)
        last = [r for r in results.rows([first, again]) if r.precision == "int8"]
        assert [row.parts["both"].median_ms for row in last] == [5.0]

    def test_a_process_that_ended_early_is_a_failure_until_all_its_kinds_are_there(self):
        run = stored_run()
        kinds = {"selections": ("random",), "precisions": ("native", "int8")}
        case = dataclasses.asdict(Case("msa", 8192, **kinds))
        done = run["records"][1] | {"case": case}
        run["records"] = [run["records"][0], done, {"case": case, "error": "ended"}]
        assert results.failures([run]) == ["msa at 8192 tokens: ended"]
        run["records"].append(done | {"precision": "int8"})
        assert results.failures([run]) == []

    def test_results_without_ceilings_or_of_another_kind_are_refused(self, tmp_path):
        run = stored_run()
        run["records"] = run["records"][1:]
        with pytest.raises(results.ResultError, match="ceilings"):
            results.rows([run])
        path = tmp_path / "other.json"
        path.write_text("[]")
        for file in (path, tmp_path / "missing.jsonl"):
            with pytest.raises(results.ResultError, match=file.name):
                results.load([file])


class TestRendering:
    def test_json_lines_become_json_a_page_and_a_plot(self, tmp_path, capsys):
        run = stored_run()
        lines = [{"environment": run["environment"]}, *run["records"]]
        source = tmp_path / "run.jsonl"
        source.write_text("\n".join(map(json.dumps, lines)))
        stem = tmp_path / "docs" / "h100"
        arguments = ["benchmark", f"--render={source}", f"--output={stem}"]
        assert cli.run(benchmark.main, arguments) == 1  # one of its cases failed
        assert results.load([stem.with_suffix(".json")]) == json.loads(json.dumps([run]))
        page = stem.with_suffix(".md").read_text()
        assert "| 8K | random | bf16 | 0.300 | 1.70 | 2.00 | 2.00 to 2.00 |" in page
        assert "| 2.00 | - | 8.00 |" in page
        assert "| 8.00* | - | - |" in page
        assert "CheckError: off" in page
        assert "NVIDIA H100" in page
        assert "Time and speed-up" in capsys.readouterr().out
        summary = json.loads(stem.with_suffix(".json").read_text())["summary"]
        notes = [row["speedup"].get("cudnn", {}).get("note") for row in summary]
        assert "extrapolated N^2 from 8192" in notes

        svg = stem.with_suffix(".svg").read_text()
        for label in ("cuDNN", "flash-msa", "MSA, random, bf16 index", "floor, bf16 index"):
            assert label in svg
        before = [file.read_bytes() for file in sorted(stem.parent.iterdir())]
        again = ["benchmark", f"--render={stem}.json", f"--output={stem}"]
        cli.run(benchmark.main, again)
        assert [file.read_bytes() for file in sorted(stem.parent.iterdir())] == before

    def test_two_commands_into_one_file_are_one_page(self, tmp_path):
        first, second = stored_run(), stored_run()
        second["records"] = [
            second["records"][0],
            {
                "case": dataclasses.asdict(Case("flash_attention_4", 8192)),
                "timings": timings(both=3.0),
                "peak_bytes": 10**9,
            },
        ]
        second["environment"] |= {"command": "the other command"}
        second["environment"] |= {"xla_flags": {"msa": "--some_flag"}}
        lines = []
        for run in (first, second):
            lines += [{"environment": run["environment"]}, *run["records"]]
        source = tmp_path / "run.jsonl"
        source.write_text("\n".join(map(json.dumps, lines)))
        page = report.page(results.load([source]), "run")
        assert "| 2.00 | 1.50 | 8.00 |" in page
        assert "`python -m experiments.benchmark`. Method" in page
        assert "`the other command`. Method" in page
        assert "XLA_FLAGS=--some_flag for msa" in page

    @pytest.mark.parametrize(
        ("milliseconds", "text"),
        [(0.0471, "0.0471"), (2, "2.00"), (442.04, "442"), (999.7, "1000"), (27400.4, "27400")],
    )
    def test_times_keep_three_digits(self, milliseconds, text):
        run = stored_run()
        run["records"][2]["timings"] = timings(both=milliseconds)
        assert f"| 8K | cuDNN | {text} |" in report.page([run], "run")

    def test_results_in_the_documentation_are_up_to_date(self):
        for path in pathlib.Path("docs/benchmarks").glob("*.json"):
            if "runs" in json.loads(path.read_text()):
                page = path.with_suffix(".md").read_text()
                runs = results.load([path])
                assert report.page(runs, path.stem) == page


class TestCommandLine:
    @pytest.mark.parametrize("found", [None, {"name": "NVIDIA A100", "compute_cap": "8.0"}])
    def test_without_a_hopper_gpu_it_says_so_in_a_line(self, found, monkeypatch, capsys):
        monkeypatch.setattr(provenance, "gpu", lambda: found)
        assert cli.run(benchmark.main, ["benchmark"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "experiments.benchmark_reference" in error

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--selections=rando", "--selections=rando: choose from random, identical"),
            ("--lengths=8X", "'8X' is not a number of tokens"),
            ("--precisions=fp8", "--precisions=fp8: choose from native, int8"),
            ("--render=missing.json", "missing.json: not a result"),
        ],
    )
    def test_wrong_flags_are_one_line(self, flag, message, monkeypatch, capsys):
        hopper = {"name": "NVIDIA H100", "compute_cap": "9.0"}
        monkeypatch.setattr(provenance, "gpu", lambda: hopper)
        assert cli.run(benchmark.main, ["benchmark", flag]) == 2
        assert message in capsys.readouterr().err

    def test_the_flags_make_the_cases(self, monkeypatch, tmp_path):
        given = {}

        def run(cases, output, environment, **rest):
            given.update(cases=cases, output=output, rest=rest)
            lines = stored_run()
            text = [{"environment": environment | {"packages": {}}}, *lines["records"]]
            output.write_text("\n".join(map(json.dumps, text)))

        monkeypatch.setattr(provenance, "gpu", lambda: {"name": "H100", "compute_cap": "9.0"})
        monkeypatch.setattr(runner, "run", run)
        arguments = ["--lengths=1K,1M", "--heads=8", "--skip_dense_above=1K", "--selections=random"]
        stem = tmp_path / "a" / "b"
        cli.run(benchmark.main, ["benchmark", *arguments, f"--output={stem}", "--baselines=cudnn"])
        assert given["output"] == stem.with_suffix(".jsonl")
        subjects = [(case.subject, case.length) for case in given["cases"]]
        assert subjects == [("ceilings", 0), ("msa", 1024), ("cudnn", 1024), ("msa", 2**20)]
        assert all(case.num_heads == 8 for case in given["cases"])
        assert stem.with_suffix(".svg").exists()
