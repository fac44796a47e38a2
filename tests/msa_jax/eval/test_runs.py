import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
from fabricated_runs import CONFIG, MSA_LAYERS, write_run

from msa_jax.config import MixerKind
from msa_jax.eval.runs import LABELS, RunFileError, read_run, read_runs, reporting_layers, series
from msa_jax.train.config import ExperimentConfig


@pytest.fixture
def msa(tmp_path):
    return write_run(tmp_path / "msa", "msa")


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_run_is_read_as_it_was_written(msa):
    run = read_run(msa)
    assert run.config == CONFIG
    assert run.label == "MSA"
    assert [len(run.train), len(run.validation), run.starts] == [40, 10, 1]
    assert run.evaluation.loss == 1.75
    assert run.selection.layers.tolist() == MSA_LAYERS
    assert run.selection.block_ids.shape == (3, 2, 256, 4)
    assert run.selection.block_size == 16


def test_every_kind_has_a_label():
    assert set(LABELS) == set(get_args(MixerKind))
    assert len(set(LABELS.values())) == len(LABELS)


def test_msa_with_a_fixed_selector_is_not_called_msa_alone(tmp_path):
    attention = dataclasses.replace(CONFIG.attention, selector="strided")
    config = dataclasses.replace(CONFIG, attention=attention)
    assert read_run(write_run(tmp_path / "fixed", "msa", config=config)).label == "MSA strided"


def test_a_dense_run_has_no_selection(tmp_path):
    run = read_run(write_run(tmp_path / "gqa", "gqa"))
    assert run.label == "GQA"
    assert run.selection is None


def test_the_last_start_of_a_resumed_run_counts(msa):
    change_json(
        msa / "manifest.json",
        lambda values: values["starts"].append(values["starts"][0] | {"resumed_from_step": 100}),
    )
    run = read_run(msa)
    assert (run.starts, run.manifest["resumed_from_step"]) == (2, 100)


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["a/msa", "a/gqa"], ["MSA", "GQA"]),
        (["k4_msa", "k8_msa"], ["k4_msa", "k8_msa"]),
        (["a/msa", "b/msa"], ["a/msa", "b/msa"]),
    ],
)
def test_labels_tell_the_runs_apart(tmp_path, monkeypatch, folders, labels):
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        write_run(tmp_path / folder, folder[-3:])
    assert [run.label for run in read_runs(folders)] == labels


def test_a_run_named_twice_is_refused(msa):
    with pytest.raises(RunFileError, match="only once"):
        read_runs([msa, msa])


@pytest.mark.parametrize(
    "name", ["manifest.json", "metrics.jsonl", "evaluation.json", "selection.npz"]
)
def test_a_missing_file_is_named(msa, name):
    (msa / name).unlink()
    with pytest.raises(RunFileError, match=f"{name}: no such file"):
        read_run(msa)


@pytest.mark.parametrize("name", ["manifest.json", "evaluation.json", "selection.npz"])
def test_a_file_cut_short_is_named(msa, name):
    content = (msa / name).read_bytes()
    (msa / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunFileError, match=f"{name}: .*cut short"):
        read_run(msa)


def test_a_damaged_record_is_named_with_its_line(msa):
    lines = (msa / "metrics.jsonl").read_text().splitlines(keepends=True)
    (msa / "metrics.jsonl").write_text("".join([*lines[:2], '{"step": 1\n', *lines[2:]]))
    with pytest.raises(RunFileError, match=r"metrics\.jsonl, line 3"):
        read_run(msa)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_run_without_records_of_a_split_is_refused(msa, split):
    lines = (msa / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["split"] != split]
    (msa / "metrics.jsonl").write_text("".join(kept))
    with pytest.raises(RunFileError, match=rf"metrics\.jsonl: no {split} record"):
        read_run(msa)


def test_a_manifest_without_starts_is_refused(msa):
    (msa / "manifest.json").write_text("{}")
    with pytest.raises(RunFileError, match=r"manifest\.json: holds no start"):
        read_run(msa)


def test_a_config_of_another_version_is_named(msa):
    change_json(
        msa / "manifest.json", lambda values: values["starts"][0]["config"].update(colour="red")
    )
    with pytest.raises(RunFileError, match=r"manifest\.json: colour: no such field"):
        read_run(msa)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("loss"), "the field 'loss' is missing"),
        (lambda values: values.update(loss="low"), "'loss' is no float: 'low'"),
        (lambda values: values["position_edges"].pop(), "5 values of loss_by_position need 6"),
        (lambda values: values["text"].pop(), "'text' has 15 strings, one for each of the 16"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(msa, change, message):
    change_json(msa / "evaluation.json", change)
    with pytest.raises(RunFileError, match=rf"evaluation\.json: {message}"):
        read_run(msa)


def test_a_selection_of_another_config_is_refused(msa):
    arrays = dict(np.load(msa / "selection.npz"))
    np.savez(msa / "selection.npz", **arrays | {"block_ids": arrays["block_ids"][:, :1]})
    message = r"selection\.npz: block_ids has shape \(3, 1, 256, 4\), .* \(3, 2, 256, 'K'\)"
    with pytest.raises(RunFileError, match=message):
        read_run(msa)


def test_series_takes_the_records_that_have_the_field():
    records = [{"step": 1, "loss": 3.0}, {"step": 2}, {"step": 3, "loss": 2.0}]
    steps, values = series(records, "loss")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [3.0, 2.0])
    assert [array.size for array in series(records, "recall")] == [0, 0]


def test_reporting_layers_follow_the_config(tmp_path):
    assert reporting_layers(CONFIG, 3, tmp_path) == [1, 2, 3]
    shared = dataclasses.replace(
        CONFIG, attention=dataclasses.replace(CONFIG.attention, share_every=2)
    )
    assert isinstance(shared, ExperimentConfig)
    assert reporting_layers(shared, 2, tmp_path) == [1, 3]
    assert reporting_layers(shared, 3, tmp_path) == [1, 2, 3]
    with pytest.raises(RunFileError, match="5 values, in the config 3 layers select blocks"):
        reporting_layers(CONFIG, 5, tmp_path)
