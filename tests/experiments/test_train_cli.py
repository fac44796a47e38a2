"""The training script: what reaches the loop, and what it ends with."""

import pathlib
import signal
import subprocess
import sys
import types

import pytest

from experiments import cli
from experiments import train as script
from msa_jax.train.checkpoint import CheckpointError
from msa_jax.train.config import ExperimentConfig
from msa_jax.train.loop import NonFiniteError

CONFIG = "configs/quickstart.py"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch):
    """Training and final evaluation replaced by notes of their arguments.

    `outcome` is what training does: raise it, be interrupted by it, or None to finish.
    """
    monkeypatch.chdir(ROOT)
    noted: dict = {"outcome": None}

    def train(config, workdir, *, progress):
        noted.update(config=config, workdir=workdir)
        if isinstance(noted["outcome"], Exception):
            raise noted["outcome"]
        return types.SimpleNamespace(interrupted=noted["outcome"], state="the last state")

    def evaluate(config, state, mesh, workdir, **options):
        noted.update(evaluated=(config, state, workdir))

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "evaluate", evaluate)
    return noted


def run(*arguments: str) -> int:
    return cli.run(script.main, ["train", *arguments])


def test_config_fields_and_workdir_reach_the_loop(calls, tmp_path):
    code = run(f"--config={CONFIG}:gqa", "--config.train.steps=7", f"--workdir={tmp_path}")
    assert code == 0
    assert calls["workdir"] == tmp_path
    assert isinstance(calls["config"], ExperimentConfig)
    assert calls["config"].train.steps == 7
    assert calls["config"].attention.kind == "gqa"
    assert calls["evaluated"] == (calls["config"], "the last state", tmp_path)


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (None, 0, ""),
        (signal.SIGTERM, 143, ""),
        (signal.SIGINT, 130, ""),
        (NonFiniteError("step 3 is not finite"), 1, "error: step 3 is not finite\n"),
        (CheckpointError("of another config"), 2, "error: of another config\n"),
    ],
)
def test_exit_codes(calls, capsys, outcome, code, line):
    calls["outcome"] = outcome
    assert run(f"--config={CONFIG}", "--workdir=unused") == code
    errors = [text for text in capsys.readouterr().err.splitlines() if "evaluation" not in text]
    assert errors == line.splitlines()
    assert ("evaluated" in calls) == (outcome is None)


def test_a_missing_workdir_is_one_line(calls, capsys):
    assert run(f"--config={CONFIG}") == 2
    assert capsys.readouterr().err.startswith("error: --workdir is missing")
    assert "config" not in calls


def test_a_config_that_cannot_work_is_one_line_from_the_real_loop(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code = run(f"--config={CONFIG}", "--config.mesh.tensor=3", f"--workdir={tmp_path}/run")
    assert code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: mesh=")
    assert len(errors.splitlines()) == 1
    assert not pathlib.Path(tmp_path, "run").exists()


def test_as_a_command():
    arguments = ["--config=configs/quickstart.py", "--config.attention.topk=8", "--workdir=unused"]
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        "error: --config.attention.topk: no such field; did you mean --config.attention.top_k?\n"
    )
