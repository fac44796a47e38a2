"""The quickstart at toy size: both runs, evaluation, table, report, and text from a run."""

import json
import pathlib

import numpy as np
import pytest

from experiments import cli, generate, quickstart
from msa_jax.eval.runs import read_run

ROOT = pathlib.Path(__file__).parents[2]
TOY = [
    "--config.model.d_model=32",
    "--config.model.num_layers=2",
    "--config.attention.num_heads=2",
    "--config.attention.head_dim=16",
    "--config.attention.rope_dim=8",
    "--config.attention.index_dim=8",
    "--config.attention.block_size=8",
    "--config.attention.top_k=3",
    "--config.moe.num_experts=2",
    "--config.moe.top_k=1",
    "--config.moe.expert_dim=16",
    "--config.data.sequence_length=64",
    "--config.data.batch_size=8",
    "--config.train.steps=4",
    "--config.train.log_every=1",
    "--config.train.eval_every=2",
    "--config.train.eval_batches=2",
    "--config.objective.index_warmup_steps=2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=-1",
    "--config.data.source=files",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few small files, so that nothing depends on this machine's standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(40):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "def f(x):", "return"], 60)
        (folder / f"{index}.txt").write_text("\n".join(words), encoding="utf-8")
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        arguments = [*TOY, f"--config.data.files={corpus}"]
        code = cli.run(quickstart.main, ["quickstart", *arguments, f"--workdir={folder}"])
    assert code == 0
    return folder


def test_report_and_figures_are_written(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(list((finished / "figures").glob("*.svg"))) >= 6


def test_runs_are_twins_and_evaluated(finished):
    msa, gqa = read_run(finished / "msa"), read_run(finished / "gqa")
    assert (msa.label, gqa.label) == ("MSA", "GQA")
    assert msa.config.data == gqa.config.data
    assert msa.config.model == gqa.config.model
    assert msa.selection is not None
    assert gqa.selection is None
    assert msa.evaluation.tokens == gqa.evaluation.tokens > 0
    assert np.isfinite(msa.evaluation.loss)
    assert {"score_recall", "block_recall"} <= set(msa.evaluation.layers)


def test_evaluation_is_the_mean_over_its_positions(finished):
    evaluation = read_run(finished / "gqa").evaluation
    assert min(evaluation.loss_by_position) <= evaluation.loss <= max(evaluation.loss_by_position)
    # A token is a byte here, but for the separators, which are no text.
    per_byte = evaluation.loss / np.log(2)
    assert per_byte <= evaluation.bits_per_byte < 1.05 * per_byte


def test_starting_again_repeats_nothing(finished, corpus, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = json.loads((finished / "msa" / "evaluation.json").read_text())
    arguments = [*TOY, f"--config.data.files={corpus}"]
    assert cli.run(quickstart.main, ["quickstart", *arguments, f"--workdir={finished}"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert json.loads((finished / "msa" / "evaluation.json").read_text()) == before


def test_a_trained_run_generates_text(finished, capsys):
    arguments = [f"--workdir={finished}/msa", "--prompt=def f", "--tokens=5"]
    assert cli.run(generate.main, ["generate", *arguments]) == 0
    assert capsys.readouterr().out.startswith("def f")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--workdir is missing"),
        (["--workdir=nowhere"], "nowhere"),
    ],
)
def test_generation_without_a_run_is_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(generate.main, ["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_the_twin_is_made_from_an_msa_config(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments = ["--config=configs/quickstart.py:gqa", f"--workdir={tmp_path}"]
    assert cli.run(quickstart.main, ["quickstart", *arguments]) == 2
    assert "attention.kind" in capsys.readouterr().err
