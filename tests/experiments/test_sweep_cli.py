"""The command: mistakes in one line, the sweeps of this repository, and one that really trains."""

import csv
import importlib
import itertools
import json
import re
import signal
import sys

import numpy as np
import pytest
import sweep_cases
from sweep_cases import ROOT, signal_when

from experiments import cli, sweep
from experiments.sweeping.storage import open_storage
from experiments.sweeping.training import trial_folder
from msa_jax.train.sweep import grid_values

SWEEP_FILE = """
from msa_jax.train.sweep import Choice, FloatRange, Objective, Sweep

def get_sweep(arg=""):
    return Sweep(
        config="configs/quickstart.py",
        parameters=(Choice("attention.top_k", (2, 4)), {parameter}),
        objectives=(Objective("validation_loss", "minimize"),),
        sampler="random",
        trials=4,
    )
"""


@pytest.mark.parametrize(
    ("parameter", "arguments", "parts"),
    [
        ("", ["--trials=0"], ["--trials=0"]),
        ("", ["--stray"], ["Unknown command line flag 'stray'"]),
        ("", ["--workdir="], ["--workdir is missing"]),
        ("", ["--config=configs/quickstart.py"], ["--config: the base config is named in"]),
        ("", ["--config.attention.topk=2"], ["attention.topk", "attention.top_k?"]),
        ("", ["--config.attention.top_k=2"], ["attention.top_k: the sweep varies this field"]),
        ("", ["--storage=redis://host"], ["--storage=redis://host: use postgresql://"]),
        ("", ["--storage=sqlite:////absent/a.db"], ["cannot be opened: ", "unable to open"]),
        ("", ["--report"], ["--report: no study"]),
        ("Choice('attention.topk', (1, 2))", [], ["no such field", "attention.top_k?"]),
        ("Choice('attention', (1, 2))", [], ["it is a section"]),
        ("Choice('train.steps', (1, 'two'))", [], ["config.train.steps=two"]),
        ("Choice('attention.selector', ('learned', 'sliding_window'))", [], ["'sink_window'"]),
        ("Choice('attention.top_k', (8,))", [], ["parameters", "name each only once"]),
        ("FloatRange('train.steps', 1.5, 2.5)", [], ["config.train.steps=1.5"]),
        ("absent", [], ["line 7: NameError: name 'absent'"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    tmp_path, monkeypatch, capsys, parameter, arguments, parts
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("experiments.sweeping.storage._OPEN_ATTEMPTS", 1)
    monkeypatch.setattr("experiments.sweeping.worker.Worker.run", lambda self: pytest.fail("ran"))
    file, workdir = tmp_path / "file.py", tmp_path / "out"
    workdir.mkdir()
    file.write_text(SWEEP_FILE.format(parameter=parameter))
    command = ["sweep", f"--sweep={file}", f"--workdir={workdir}", *arguments]
    assert cli.run(sweep.main, command) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1, error
    for part in parts:
        assert part in error
    assert not (workdir / "trials").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--sweep is missing"),
        (["--sweep=absent.py"], "--sweep=absent.py: there is no file 'absent.py'"),
        (["--sweep"], "--sweep is empty"),
        (["--sweep=configs/quickstart.py"], "has no attribute 'get_sweep'"),
    ],
)
def test_a_missing_sweep_is_one_line(monkeypatch, capsys, arguments, part):
    monkeypatch.chdir(ROOT)
    assert cli.run(sweep.main, ["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error


def test_without_optuna_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["--sweep=configs/sweeps/quickstart.py", f"--workdir={tmp_path}/out"]
    assert cli.run(sweep.main, ["sweep", *command]) == 2
    assert "pip install 'msa-jax[sweeps]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("postgresql://host/name", "'psycopg[binary]'"),
        ("postgresql+psycopg2://host/name", "psycopg2-binary"),
        ("mysql://host/name", "mysqlclient"),
        ("mysql+pymysql://host/name", "pymysql"),
    ],
)
def test_a_missing_driver_is_named(monkeypatch, tmp_path, url, package):
    """SQLAlchemy's default drivers change with its versions."""
    modules = ("psycopg", "psycopg2", "MySQLdb", "pymysql")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(cli.UsageError, match=re.escape(f"--storage={url}: pip install {package}")):
        open_storage(url, tmp_path)


@pytest.mark.parametrize(
    ("file", "trials"),
    [
        ("quickstart.py", 12),
        ("sparsity.py", 120),
        ("sparsity.py:grid", 3840),
        ("budget.py", 8),
        ("alignment.py", 9),
        ("detach.py", 6),
    ],
)
def test_the_sweeps_of_this_repository_are_valid(monkeypatch, file, trials):
    monkeypatch.chdir(ROOT)
    chosen = cli.load_file("sweep", f"configs/sweeps/{file}", "get_sweep")
    space = sweep_cases.space_of(chosen)
    if trials <= 12:  # small ones leave nothing out
        fields = [parameter.field for parameter in chosen.parameters]
        for point in itertools.product(*map(grid_values, chosen.parameters)):
            space.config(dict(zip(fields, point, strict=True)))
    assert chosen.total_trials == trials
    text = importlib.import_module(f"configs.sweeps.{file.partition('.')[0]}").__doc__
    command = f"python -m experiments.sweep --sweep=configs/sweeps/{file.partition(':')[0]}"
    for part in (command, "Hardware:", "Expected result:"):
        assert part in text


def test_the_command_trains_is_interrupted_and_goes_on(tmp_path, monkeypatch):
    """A real point, stopped half way; then the files that people read."""
    rng = np.random.default_rng(0)
    for index in range(30):
        words = rng.choice(["alpha", "beta", "gamma", "def f(x):", "return"], 40)
        (tmp_path / f"{index}.txt").write_text("\n".join(words), encoding="utf-8")
    workdir = tmp_path / "out"
    arguments = ["--sweep=configs/sweeps/quickstart.py", f"--workdir={workdir}", "--trials=1"]
    data = ["--config.data.source=files", f"--config.data.files={tmp_path}/*.txt"]
    loop = {"steps": 100, "log_every": 1, "checkpoint_every": 100}
    short = [f"--config.train.{field}={value}" for field, value in loop.items()]
    command = ["sweep", *arguments, *data, *short]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    begun = trial_folder(workdir, 0) / "manifest.json"
    metrics = begun.with_name("metrics.jsonl")
    with signal_when(lambda: metrics.exists() and metrics.stat().st_size, signal.SIGINT):
        assert cli.run(sweep.main, command) == 128 + signal.SIGINT
    assert list((trial_folder(workdir, 0) / "checkpoints").iterdir())
    assert cli.run(sweep.main, command) == 0
    starts = json.loads(begun.read_text())["starts"]
    first, second = (start["resumed_from_step"] for start in starts)
    assert first is None
    assert 1 <= second < 100
    attention = starts[1]["config"]["attention"]
    assert (attention["top_k"], attention["block_size"], attention["index_dim"]) == (2, 8, 8)
    evaluation = json.loads((trial_folder(workdir, 0) / "evaluation.json").read_text())
    (row,) = csv.DictReader((workdir / "results.csv").read_text().splitlines())
    assert (row["number"], row["state"], row["attention.top_k"]) == ("0", "complete", "2")
    assert float(row["validation_loss"]) == evaluation["loss"]
    assert float(row["score_recall"]) == np.mean(evaluation["layers"]["score_recall"])
    assert "1 complete" in (workdir / "report.html").read_text()
