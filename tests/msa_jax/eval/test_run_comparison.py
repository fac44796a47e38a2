"""Runs of several models and seeds in one table: grouping, means, what is left out."""

import dataclasses
import json

import numpy as np
import pytest
from fabricated_runs import CONFIG, write_run

from experiments import cli, compare
from msa_jax.config import ConfigError
from msa_jax.eval.comparison import length_table, main_table
from msa_jax.eval.contenders import read_contenders

FINAL = {"msa_0": 1.70, "msa_1": 1.74, "gqa_0": 1.60}


def with_seed(seed):
    train, data = (dataclasses.replace(part, seed=seed) for part in (CONFIG.train, CONFIG.data))
    return dataclasses.replace(CONFIG, train=train, data=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    for name, loss in FINAL.items():
        kind, _, seed = name.partition("_")
        write_run(base / name, kind, config=with_seed(int(seed)), final_loss=loss)
        (base / name / "selection.npz").unlink(missing_ok=True)
    scores = {"msa_0": [1.0, 0.5, 0.0], "msa_1": [1.0, 1.0, None], "gqa_0": [1.0, 1.0, 1.0]}
    (base / "long").mkdir()
    for name, exact in scores.items():
        cells = {
            "needle:passkey:2048": {"depths": [0, 0.5, 1], "exact": exact, "choice": exact},
            "ruler:multi_key:2048": {"recall": 0.25, "choice": 0.5},
            "ruler:passkey:2048": {"recall": 0.75, "choice": 0.5},
            "perplexity:validation:2048": {"loss": 1.5, "bits_per_byte": 2.1},
            "perplexity:other:2048": {"loss": 9.0, "bits_per_byte": 9.0},
        }
        if name != "gqa_0":
            cells["needle:passkey:8192"] = {"depths": [0.5], "exact": [0.5], "choice": [0.5]}
        content = {"identity": {"run": name}, "cells": cells}
        (base / "long" / f"{name}.json").write_text(json.dumps(content))
    return base


@pytest.fixture(scope="module")
def contenders(folder):
    results = sorted(map(str, (folder / "long").glob("*.json")))
    return read_contenders([str(folder / name) for name in FINAL], results)


def test_runs_that_differ_in_seeds_alone_are_one_row(contenders):
    assert [(one.label, one.folders) for one in contenders] == [
        ("MSA", ("msa_0", "msa_1")),
        ("GQA", ("gqa_0",)),
    ]
    head, (msa, gqa) = main_table(contenders, "GQA")
    row = dict(zip(head, msa, strict=True))
    assert row["validation loss"] == "1.7200 ± 0.0200"
    assert row["relative to GQA"] == "+7.50 %"
    assert row["score recall"] == "0.920 ± 0.000"
    assert row["tokens per second"] == "4,105"  # the median without the first record
    row = dict(zip(head, gqa, strict=True))
    assert row["validation loss"] == "1.6000"
    assert (row["relative to GQA"], row["score recall"]) == ("same", "-")
    assert contenders[0].attention_flops < contenders[1].attention_flops
    assert contenders[0].tokens == 200 * CONFIG.data.batch_size * CONFIG.data.sequence_length


def test_scores_are_means_over_depths_tasks_and_seeds(contenders):
    head, rows = length_table(contenders, "needle")
    assert head == ["needle, exact", "2K", "8K"]
    assert rows[0] == ["MSA", "0.750 ± 0.250", "0.500 ± 0.000"]
    assert rows[1] == ["GQA", "1.000", "-"]
    np.testing.assert_allclose(contenders[0].by_length["ruler"][2048], 0.5)
    assert contenders[0].by_length["loss"] == {2048: (1.5, 1.5)}


def test_models_of_one_kind_are_told_apart_by_folder(folder, tmp_path):
    attention = dataclasses.replace(CONFIG.attention, top_k=8)
    config = dataclasses.replace(CONFIG, attention=attention)
    write_run(tmp_path / "msa_wide", "msa", config=config)
    found = read_contenders([str(folder / "msa_0"), str(tmp_path / "msa_wide")])
    assert [one.label for one in found] == ["msa_0", "msa_wide"]
    with pytest.raises(ConfigError, match="'GQA' is none of what is compared: msa_0, msa_wide"):
        main_table(found, "GQA")


def test_the_command_writes_tables_numbers_and_figures(folder, tmp_path, capsys):
    runs = [f"--run={folder / name}" for name in FINAL]
    arguments = [*runs, f"--results={folder}/long/*.json", f"--output={tmp_path}/page"]
    assert cli.run(compare.main, ["compare", *arguments]) == 0
    text = (tmp_path / "page/comparison.md").read_text()
    assert capsys.readouterr().out == text + "\n"
    assert text.count("\n\n") == 5  # losses; needle and RULER, two scores each; loss by length
    assert "| MSA |" in text
    numbers = json.loads((tmp_path / "page/comparison.json").read_text())
    assert numbers[0]["losses"] == [1.7, 1.74]
    assert {path.name for path in (tmp_path / "page").glob("*.svg")} == {
        "losses.svg",
        "needle.svg",
        "ruler.svg",
    }
    assert "MSA" in (tmp_path / "page/losses.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--run is missing"),
        (["--run=absent"], "absent/manifest.json: no such file"),
        (["--run={}/msa_0", "--results=none/*.json"], "--results=none/*.json: matches no file"),
        (["--run={}/msa_0", "--results={}/long/gqa_0.json"], "gqa_0: results of none of the runs"),
        (["--run={}/msa_0", "--results={}/msa_0/metrics.jsonl"], "holds no results"),
        (["--run={}/msa_0"], "'GQA' is none of what is compared: MSA"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(folder) for argument in arguments]
    assert cli.run(compare.main, ["compare", *filled]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error
    assert not list(tmp_path.iterdir())
