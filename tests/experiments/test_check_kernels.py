"""The kernels' device check: its oracles, cases and verdicts, on the references at toy size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import check_kernels, cli
from experiments.benchmarking import provenance
from experiments.checking import (
    alignment,
    attention,
    gradients,
    oracle,
    poison,
    precision,
    processes,
    selection,
)
from experiments.checking import selections as made
from experiments.checking.cases import (
    PREFIX,
    AlignmentCase,
    AttentionCase,
    GradientCase,
    Place,
    PrecisionCase,
    SelectionCase,
    label,
)
from experiments.checking.forward_cases import shape as full_shape
from experiments.checking.groups import groups
from experiments.checking.judgement import MARK, Figure, record
from experiments.checking.worker import run
from pallas_kernels import BlockSelection, index_kl, select_blocks, sparse_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "index_dim": 16,
    "block_size": 8,
    "top_k": 4,
}
PACKED = Place(100, (28, 60), packed=True)


def tiny(length=160, **fields):
    return full_shape(length, **TINY | fields)


def passes(figures):
    return record(figures)["passed"]


def failures(figures):
    return {name for name, figure in figures.items() if not figure.passed}


ATTENTION = [
    *(AttentionCase(tiny(), kind, "auto") for kind in (*made.SELECTIONS, "learned")),
    AttentionCase(tiny(seed=1, batch=2), "learned", "auto", place=PACKED),
    AttentionCase(tiny(batch=2), "random", "auto", dtype="float16", place=PACKED),
    AttentionCase(tiny(157), "strewn", "auto", place=Place(40, 101)),
]
GRADIENTS = [
    GradientCase(tiny(), "masked"),
    GradientCase(tiny(), "random", rematerialised=True),
    GradientCase(tiny(), "random", stacked=True),
    GradientCase(tiny(batch=2), "random", dtype="float16", place=PACKED),
]
ALIGNMENT = [
    AlignmentCase(tiny(), "masked"),
    AlignmentCase(tiny(157), PREFIX),
    AlignmentCase(tiny(batch=2), "random", dtype="float16", place=PACKED),
]
SELECTION = [
    SelectionCase(tiny()),
    SelectionCase(tiny(157, batch=2), local_blocks=2, sink_blocks=1, place=Place(99, (0, 58))),
    SelectionCase(tiny(batch=2), sink_blocks=2, place=PACKED),
    SelectionCase(tiny(seed=2), "random"),
    SelectionCase(tiny(batch=2), "random", "int8", place=PACKED),
]


class TestWhatIsRight:
    @pytest.mark.parametrize("case", ATTENTION, ids=label)
    def test_attention_passes(self, case):
        assert not failures(attention.check(case, "reference"))

    @pytest.mark.parametrize("case", GRADIENTS, ids=label)
    def test_gradients_pass(self, case):
        assert not failures(gradients.check(case, "reference"))

    @pytest.mark.parametrize("case", ALIGNMENT, ids=label)
    def test_alignment_passes(self, case):
        assert not failures(alignment.check(case, "reference"))

    @pytest.mark.parametrize("case", SELECTION, ids=label)
    def test_selection_passes(self, case):
        assert not failures(selection.check(case, "reference"))


def broken_attention(change):
    """`sparse_attention` with a change to its results or arguments."""

    def call(q, k, v, chosen, **options):
        return change(lambda ids: sparse_attention(q, k, v, BlockSelection(ids, 8), **options))(
            chosen.block_ids
        )

    return call


def drop_a_block(attend):
    return lambda ids: attend(ids.at[0, 1, 77, 0].set(-1))


def forget_a_row(attend):
    def changed(ids):
        o, lse = attend(ids)
        return o.at[0, 150].set(jnp.nan), lse.at[0, 3, 9].set(jnp.nan)

    return changed


def swap_queries(attend):
    def changed(ids):
        o, lse = attend(ids)
        return o.at[0, 20].set(o[0, 21]), lse

    return changed


def shift_log_sums(attend):
    def changed(ids):
        o, lse = attend(ids)
        return o, lse + 2e-4

    return changed


class TestWhatIsWrong:
    def test_wrong_gradients_fail(self, monkeypatch):
        """Of an output whose log-sum-exp has no derivative."""

        def detached(*arrays, **options):
            o, lse = sparse_attention(*arrays, **options)
            return o, jax.lax.stop_gradient(lse)

        monkeypatch.setattr(gradients, "sparse_attention", detached)
        gradients._jitted.cache_clear()
        figures = gradients.check(GradientCase(tiny(), "random"), "reference")
        gradients._jitted.cache_clear()
        assert failures(figures) == {"dq_error", "dk_error"}

    @pytest.mark.parametrize(
        ("change", "failing"),
        [
            (lambda loss, kl, lse: (loss, kl * 1.01, lse), {"kl_error"}),
            (lambda loss, kl, lse: (loss, kl, lse + 2e-4), {"lse_error"}),
            (
                lambda loss, kl, lse: (loss * 1.02, kl, lse),
                {"dindex_q_error", "dindex_k_error"},
            ),
        ],
    )
    def test_a_wrong_alignment_fails(self, monkeypatch, change, failing):
        def wrong(*arrays, **options):
            result = index_kl(*arrays, **options)
            return type(result)(*change(*result))

        monkeypatch.setattr(alignment, "index_kl", wrong)
        alignment._jitted.cache_clear()
        figures = alignment.check(AlignmentCase(tiny(), "random"), "reference")
        alignment._jitted.cache_clear()
        assert failures(figures) >= failing
        assert failures(figures) <= failing | {"dindex_q_error", "dindex_k_error"}

    @pytest.mark.parametrize(
        ("change", "failing"),
        [
            (drop_a_block, {"worst_row", "error", "lse_error"}),
            (swap_queries, {"worst_row", "error"}),
            (shift_log_sums, {"lse_error"}),
        ],
    )
    def test_a_wrong_output_fails(self, monkeypatch, change, failing):
        self.break_attention(monkeypatch, change)
        figures = attention.check(AttentionCase(tiny(), "random", "auto"), "reference")
        assert failures(figures) == failing

    def test_what_is_not_written_fails_even_off_the_sampled_queries(self, monkeypatch):
        self.break_attention(monkeypatch, forget_a_row)
        case = AttentionCase(tiny(seed=5, sampled_rows=6), "random", "auto")
        rows = attention.sample(case).rows
        assert len(rows) == 6
        assert not {9, 150} & set(rows)
        found = attention.check(case, "reference")
        assert failures(found) == {"unwritten_outputs", "unwritten_log_sums"}
        assert found["unwritten_outputs"].value == 4 * 16
        assert found["unwritten_log_sums"].value == 1

    def test_an_output_without_blocks_that_is_not_zero_fails(self, monkeypatch):
        self.break_attention(monkeypatch, lambda attend: lambda ids: attend(jnp.maximum(ids, 0)))
        figures = attention.check(AttentionCase(tiny(), "masked", "auto"), "reference")
        assert {"unwritten_outputs", "unwritten_log_sums"} <= failures(figures)

    def test_runs_that_differ_fail(self, monkeypatch):
        calls = []

        def run_of(call, *arguments):
            def run():
                calls.append(1)
                o, lse = call(*arguments)
                return o.at[0, 7, 1, 3].multiply(1 + len(calls) / 64), lse

            return run

        monkeypatch.setattr(attention, "poisoned", run_of)
        figures = attention.check(AttentionCase(tiny(), "random", "auto"), "reference")
        assert "runs_that_differ" in failures(figures)

    @pytest.mark.parametrize(
        ("change", "failing"),
        [
            (lambda ids: ids.at[0, 0, 100, 1].set(ids[0, 0, 100, 0]), "ids_out_of_form"),
            (lambda ids: ids.at[0, 1, 3, 1].set(0), "ids_out_of_form"),
            (lambda ids: ids[..., ::-1], "ids_out_of_form"),
            (
                lambda ids: ids.at[0, 1, :, 0].set(jnp.where(ids[0, 1, :, 0] < 0, -1, 0)),
                "score_gap",
            ),
        ],
    )
    def test_a_wrong_selection_fails(self, monkeypatch, change, failing):
        def broken(*arrays, **options):
            chosen = select_blocks(*arrays, **options)
            return BlockSelection(change(chosen.block_ids), chosen.block_size)

        monkeypatch.setattr(selection, "select_blocks", broken)
        selection._jitted.cache_clear()
        figures = selection.check(SelectionCase(tiny(), "random"), "reference")
        selection._jitted.cache_clear()
        assert failing in failures(figures)

    def test_ties_must_go_to_the_lower_block(self, monkeypatch):
        def broken(index_q, index_k, **options):
            """Prefers the higher block among equals by so little that no gap shows it."""
            lift = 1 + jnp.arange(index_k.shape[1])[:, None] // 8 * 1e-6
            lifted = index_k.astype(jnp.float32) * lift
            return select_blocks(index_q.astype(jnp.float32), lifted, **options)

        monkeypatch.setattr(selection, "select_blocks", broken)
        selection._jitted.cache_clear()
        figures = selection.check(SelectionCase(tiny()), "reference")
        selection._jitted.cache_clear()
        assert failures(figures) == {"queries_that_differ"}

    def break_attention(self, monkeypatch, change):
        monkeypatch.setattr(attention, "sparse_attention", broken_attention(change))
        monkeypatch.setattr(attention, "_jitted", attention._jitted.__wrapped__)


class TestSelections:
    def test_they_are_what_they_are_called(self):
        shape = tiny(512, top_k=8, block_size=8)
        ids = {kind: np.asarray(made.select(kind, shape, Place(), "")) for kind in made.SELECTIONS}
        assert (ids["one_block"][..., 0] == 0).all()
        assert (ids["one_block"][..., 1:] == -1).all()
        late = ids["no_overlap"][0, 0, 256:]
        shared = [len(np.intersect1d(*late[i : i + 2])) for i in range(0, 200, 2)]
        assert np.mean(shared) < 0.5
        assert (late >= 0).all()
        assert (ids["masked"] == -1).all(-1)[0, 0].sum() > 100
        own = np.arange(512)[:, None] // 8
        assert (ids["strewn"][0, 0] > own).any()
        assert (ids["strewn"][0, 0, 1::2] >= 64).any()
        inside = ids["strewn"][0, 0, 300:, :5]
        assert ((inside[:, :-1] < 0) & (inside[:, 1:] >= 0)).any()
        random = ids["random"]
        assert (np.where(random < 0, 99, random).argsort(-1, kind="stable")[..., 0] == 0).all()
        assert (random.max(-1) == own[:, 0]).all()

    def test_documents_have_padding_behind_them_and_begin_blocks(self):
        ids = np.asarray(made.segment_ids(tiny(batch=2), Place(packed=True)))
        assert set(np.unique(ids)) == {0, 1, 2, 3}
        assert (ids[0] != ids[1]).any()
        starts = np.flatnonzero((np.diff(ids[0]) != 0) & (ids[0, 1:] > 0)) + 1
        assert (starts % 8 == 0).all()
        assert ids[0, -1] == 0


class TestPrecision:
    def test_recall_counts_past_blocks_of_full_queries(self):
        ids = jnp.asarray([[[[0, 1, 2], [0, 1, 9], [3, 4, 9], [5, 6, 9]]]])
        others = jnp.asarray([[[[7, 8, 2], [0, 1, 9], [3, 5, 9], [6, 7, 9]]]])
        assert float(precision.recall(ids, others, 1)) == pytest.approx((2 + 1 + 1) / 6)

    def test_an_eight_bit_index_costs_a_little(self):
        case = PrecisionCase(tiny(512, block_size=8, top_k=8), "random")
        figures = precision.check(case, "reference")
        assert 0.8 < figures["recall"].value < 1
        assert 1e-4 < figures["output_change"].value < 0.5


class TestRun:
    def test_a_case_that_raises_is_one_failure(self):
        case = AttentionCase(tiny(), "random", "auto")
        wrong = dataclasses.replace(case, place=Place(100, 100))
        failed, passed = run([wrong, case], "reference")
        assert not failed["passed"]
        assert "need 200 key slots" in failed["error"]
        assert passed["passed"]
        assert passed["figures"]["error"] < passed["bars"]["error"]
        assert "FAIL" in check_kernels.line({"group": "g"} | failed)
        assert check_kernels.line({"group": "g"} | passed).startswith("ok   g: attention, 160")

    def test_a_nan_does_not_pass(self):
        assert not record({"error": Figure(float("nan"), 1.0)})["passed"]

    def test_labels_tell_the_cases_of_a_group_apart(self):
        for name, cases in groups(quick=False, million=True).items():
            labels = [label(case) for case in cases]
            assert len(set(labels)) == len(labels) > 1, name

    def test_quick_stays_at_2k_and_million_adds_its_own(self):
        quick, whole = groups(quick=True, million=False), groups(quick=False, million=True)
        assert {case.shape.length for cases in quick.values() for case in cases} <= set(
            range(1999, 2101)
        )
        assert {name for name in whole if name.endswith("1M")} == {
            "attention at 1M",
            "selection at 1M",
        }

    def test_other_kernels_are_asked_what_they_have(self):
        found = groups(quick=False, million=False, implementation="triton")
        cases = [case for group in found.values() for case in group]
        assert {getattr(case, "scheme", "auto") for case in cases} == {"auto"}
        assert {getattr(case, "precision", "native") for case in cases} == {"native"}
        kinds = {AttentionCase, GradientCase, AlignmentCase, SelectionCase}
        assert {type(case) for case in cases} == kinds

    def test_an_unknown_group_is_named(self, capsys, monkeypatch):
        gpu = {"name": "NVIDIA A100", "compute_cap": "8.0"}
        monkeypatch.setattr(provenance, "gpu", lambda: gpu)
        argv = ["check_kernels", "--implementation=triton", "--groups=speed"]
        assert cli.run(check_kernels.main, argv) == 2
        assert "--groups=speed: none begins so of attention at 8K" in capsys.readouterr().err
        assert cli.run(check_kernels.main, argv[:1]) == 2
        assert "Hopper GPU, found NVIDIA A100" in capsys.readouterr().err

    def test_without_a_gpu_it_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(provenance, "gpu", lambda: None)
        assert cli.run(check_kernels.main, ["check_kernels"]) == 2
        assert "NVIDIA Hopper GPU, found none" in capsys.readouterr().err

    def test_records_are_written_and_a_failure_is_the_exit_code(
        self, capsys, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(
            provenance, "gpu", lambda: {"name": "NVIDIA H100", "compute_cap": "9.0"}
        )
        verdicts = iter([True, False, True, True])

        def of_groups(names, order, **_):
            case = {"case": "one", "figures": {"error": 0.5}, "bars": {"error": 1.0}}
            for name in names[:2]:
                yield {"group": name, "passed": next(verdicts)} | case

        monkeypatch.setattr(processes, "run", of_groups)
        argv = ["check_kernels", "--quick", f"--output={tmp_path}"]
        assert check_kernels.main(argv) == 1
        assert "1 of 2 checks passed" in capsys.readouterr().out
        found = json.loads((tmp_path / "checks.json").read_text())
        assert found["environment"]["command"].endswith(
            f"check_kernels --quick --output={tmp_path}"
        )
        assert [line["passed"] for line in found["records"]] == [True, False]
        assert check_kernels.main(argv) == 0

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ("raise SystemExit(3)", "exit code 3: last words"),
            ("import time; time.sleep(60)", "ended after 2 s: last words"),
            ("", ""),
        ],
    )
    def test_a_process_that_dies_keeps_what_it_printed(self, monkeypatch, tmp_path, script, reason):
        line = MARK + json.dumps({"case": "one", "passed": True})
        fake = tmp_path / "python"
        body = f"print({line!r}); print('last words', flush=True); {script}"
        fake.write_text(f"#!{processes.sys.executable}\n{body}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(processes.sys, "executable", str(fake))
        records = list(processes.run(["group"], {}, jobs=2, seconds=2))
        assert records[0]["case"] == "one"
        assert records[0]["group"] == "group"
        assert [record.get("error") for record in records[1:]] == ([reason] if reason else [])


def test_poison_is_no_number_in_any_float():
    pattern = np.full(4, poison._PATTERN, np.int32)
    assert np.isnan(pattern.view(np.float32)).all()
    assert np.isnan(pattern.view(np.float16)).all()
    assert np.isnan(pattern.view(jnp.bfloat16).astype(np.float32)).all()
    assert pattern[0] > 2**30  # no block's id
    poison.poison(4096)  # runs where there are no memory statistics


def test_the_oracle_is_in_float64():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 64, 2, 16)) for key in keys)
    ids = jnp.broadcast_to(jnp.arange(8), (1, 2, 64, 8))
    queries = oracle.Queries(np.arange(64), np.arange(64)[None], np.zeros((1, 64), int), None)
    o, lse = oracle.attention(q, k, v, ids, queries, 8)
    scores = np.einsum("thd,shd->hts", *(np.asarray(x[0], np.float64) for x in (q, k))) / 4
    scores = np.where(np.tri(64, dtype=bool), scores, -np.inf)
    weights = np.exp(scores)
    np.testing.assert_allclose(lse[0].T, np.log(weights.sum(-1)), rtol=1e-13)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hts,shd->thd", weights, np.asarray(v[0], np.float64))
    np.testing.assert_allclose(o[0], expected, rtol=1e-12, atol=1e-14)
