"""The Pareto front, `results.csv`, the figures and the page, from trials with made-up scores."""

import csv
import io
import itertools
import re

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from optuna.trial import TrialState, create_trial
from sweep_cases import OBJECTIVES, make_sweep, space_of

from experiments.sweeping import figures
from experiments.sweeping.objectives import ObjectiveError, attention_flops, read_objectives
from experiments.sweeping.report import all_figures, write_results
from experiments.sweeping.results import pareto_front, read_rows, to_csv
from msa_jax import cost
from msa_jax.train.sweep import Choice, FloatRange, IntRange, Objective

DISTRIBUTIONS = {
    "attention.top_k": optuna.distributions.CategoricalDistribution((2, 4, 8)),
    "attention.block_size": optuna.distributions.CategoricalDistribution((8, 16)),
    "objective.kl_weight": optuna.distributions.CategoricalDistribution((0.5, 2.0)),
}


def dominates(a, b, directions):
    better = [x < y if d == "minimize" else x > y for x, y, d in zip(a, b, directions, strict=True)]
    worse = [x > y if d == "minimize" else x < y for x, y, d in zip(a, b, directions, strict=True)]
    return any(better) and not any(worse)


@settings(deadline=None, max_examples=60)
@given(
    values=arrays.arrays(
        float, st.tuples(st.integers(0, 12), st.just(3)), elements=st.integers(0, 4)
    ),
    directions=st.lists(st.sampled_from(["minimize", "maximize"]), min_size=3, max_size=3),
)
def test_the_front_is_what_nothing_dominates(values, directions):
    """Small integers, so that ties and equal points come up."""
    expected = [not any(dominates(b, a, directions) for b in values) for a in values]
    assert pareto_front(values, directions).tolist() == expected


@pytest.fixture
def study():
    """The grid with trial 4 failed, 7 pruned and 11 running."""
    study = optuna.create_study(directions=[one.direction for one in OBJECTIVES])
    for number, (top_k, size, weight) in enumerate(itertools.product((2, 4, 8), (8, 16), (0.5, 2))):
        params = {
            "attention.top_k": top_k,
            "attention.block_size": size,
            "objective.kl_weight": weight,
        }
        state, error = {
            4: (TrialState.FAIL, "exit code 1: a <b>bad</b> thing, with a comma"),
            7: (TrialState.PRUNED, "cannot work"),
            11: (TrialState.RUNNING, ""),
        }.get(number, (TrialState.COMPLETE, ""))
        values = [3 - 0.1 * top_k + 0.01 * size + 0.05 * weight, 0.5 + 0.02 * weight, top_k * size]
        study.add_trial(
            create_trial(
                state=state,
                params=params,
                distributions=DISTRIBUTIONS,
                values=values if state == TrialState.COMPLETE else None,
                user_attrs={"seconds": 10.0 + number} | ({"error": error} if error else {}),
            )
        )
    return study


def test_the_front_is_optunas(study):
    rows = read_rows(study, make_sweep())
    front = {row.number for row in rows if row.on_front}
    assert front == {trial.number for trial in study.best_trials}
    assert 0 < len(front) < 9


def test_the_table_has_every_trial(study):
    sweep = make_sweep()
    text = to_csv(read_rows(study, sweep), sweep)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["number"] for row in rows] == [str(number) for number in range(12)]
    assert list(rows[0]) == [
        "number", "state", "attention.top_k", "attention.block_size", "objective.kl_weight",
        "validation_loss", "score_recall", "attention_flops", "on_front", "seconds", "same_as",
        "error",
    ]  # fmt: skip
    assert rows[4]["state"] == "failed"
    assert rows[4]["error"] == "exit code 1: a <b>bad</b> thing, with a comma"
    assert rows[4]["validation_loss"] == ""
    assert (rows[7]["state"], rows[11]["state"]) == ("pruned", "running")
    trial = study.get_trials()[5]
    assert float(rows[5]["validation_loss"]) == trial.values[0]
    assert (rows[5]["attention.top_k"], rows[5]["seconds"]) == ("4", "15.0")


def test_trials_beyond_the_size_are_left_out(study):
    sweep = make_sweep(trials=3)
    assert [row.number for row in read_rows(study, sweep)] == [0, 1, 2]


def test_the_report_is_one_page_that_needs_no_network(study, tmp_path):
    assert write_results(study, space_of(make_sweep()), tmp_path) == 9
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "12 trials planned: 9 complete, 1 failed, 1 pruned, 1 running." in page
    assert "a &lt;b&gt;bad&lt;/b&gt; thing" in page
    # a scatter, a parallel plot, and a map for 3 pairs of parameters and 3 objectives
    assert page.count("<svg") == 2 + 9
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"pareto", "parallel_coordinates"} < names
    assert "score_recall_attention_top_k_objective_kl_weight" in names
    assert len(names) == 11
    assert {path.name for path in tmp_path.iterdir()} == {
        "figures", "report.html", "results.csv", "results.lock"
    }  # fmt: skip


def test_a_study_that_has_just_begun_has_a_report(tmp_path):
    study = optuna.create_study(directions=[one.direction for one in OBJECTIVES])
    assert write_results(study, space_of(make_sweep()), tmp_path) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "12 trials planned: none begun" in page
    assert "<svg" not in page


def test_one_objective_has_no_pareto_plot_and_one_parameter_no_map(study):
    sweep = make_sweep(objectives=OBJECTIVES[:1], parameters=(Choice("attention.top_k", (2, 4)),))
    single = optuna.create_study(direction="minimize")
    for top_k in (2, 4):
        params = {"attention.top_k": top_k}
        distributions = {"attention.top_k": optuna.distributions.CategoricalDistribution((2, 4))}
        single.add_trial(create_trial(params=params, distributions=distributions, values=[top_k]))
    assert set(all_figures(read_rows(single, sweep), sweep)) == {"parallel_coordinates"}


def test_cells_of_a_heat_map_are_means():
    columns = figures.scale(Choice("a", ("x", "y", "z")), ["x", "z", "x", "z", "z"])
    lines = figures.scale(IntRange("b", 1, 9), [5, 5, 5, 1, 5])
    assert (columns.labels, lines.labels) == (["x", "z"], ["1", "5"])
    means = figures.cell_means(columns, lines, np.array([1.0, 2.0, 4.0, 8.0, 4.0]))
    np.testing.assert_array_equal(means, [[np.nan, 8.0], [2.5, 3.0]])


def test_a_range_is_cut_into_bins_of_equally_many_values():
    values = list(np.geomspace(0.01, 10, 60))
    scale = figures.scale(FloatRange("a", 0.01, 10.0, log=True), values)
    assert np.bincount(scale.places).tolist() == [10] * 6
    assert len(scale.labels) == 6
    assert scale.labels[0].startswith("0.01 to ")
    assert scale.labels[-1].endswith(" to 10")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.30038, "0.3004"), (7200.0, "7200"), (24576.0, "24.58K"), (1.5e6, "1.5M"), (2e9, "2B")],
)
def test_numbers_are_shown_in_four_digits(value, text):
    assert figures.short_number(value) == text


EVALUATION = (
    '{"step": 5, "tokens": 9, "loss": 2.5, "bits_per_byte": 3.6, "position_edges": [0, 16], '
    '"loss_by_position": [2.5], "layers": {"score_recall": RECALL}}'
)


def read(folder, *names):
    config = space_of(make_sweep()).base
    return read_objectives([Objective(name, "minimize") for name in names], config, folder)


def test_objectives_are_read_from_the_run(tmp_path):
    (tmp_path / "evaluation.json").write_text(EVALUATION.replace("RECALL", "[0.5, 0.9]"))
    rates = [None, 10.0, 1000.0, 3000.0, 2000.0]
    lines = ['{"step": 1, "split": "train", "loss": 2.0}']
    lines += [
        f'{{"step": {n}, "split": "train", "clock/tokens_per_second": {rate}}}'
        for n, rate in enumerate(rates)
        if rate
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    loss, recall, flops, rate = read(
        tmp_path, "validation_loss", "score_recall", "attention_flops", "tokens_per_second"
    )
    assert (loss, recall, rate) == (2.5, 0.7, 2000.0)
    config = space_of(make_sweep()).base
    one = cost.attention_flops(config.attention, 512).total
    assert flops == attention_flops(config) == config.model.num_layers * one / 512


@pytest.mark.parametrize(
    ("recall", "name", "part"),
    [
        ("[]", "score_recall", "attention.kind='msa' selects no blocks"),
        ("[0.0, 0.0]", "score_recall", "no query of the evaluation sees more blocks than"),
        ("[NaN]", "score_recall", "score_recall is nan"),
        ("[0.5]", "tokens_per_second", "tokens_per_second"),
    ],
)
def test_a_missing_score_says_why(tmp_path, recall, name, part):
    (tmp_path / "evaluation.json").write_text(EVALUATION.replace("RECALL", recall))
    with pytest.raises(ObjectiveError, match=re.escape(part)):
        read(tmp_path, name)
