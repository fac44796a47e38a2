"""`--match` of the training script: the size reaches the loop, and mistakes are one line."""

import pathlib
import types

import pytest

from experiments import cli
from experiments import train as script
from msa_jax import cost
from msa_jax.config import dense_twin

CONFIG = "configs/quickstart.py"


@pytest.fixture
def trained(monkeypatch):
    """The configs that training was called with."""
    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    found = []

    def train(config, workdir, *, progress):
        found.append(config)
        return types.SimpleNamespace(interrupted=None, state=None)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "evaluate", lambda *arguments, **options: None)
    return found


def run(tmp_path, *arguments):
    return cli.run(script.main, ["train", f"--workdir={tmp_path}", *arguments])


@pytest.mark.parametrize("by", ["params", "flops"])
def test_the_run_is_as_large_as_the_reference(by, trained, tmp_path, capsys):
    gqa = [f"--config={CONFIG}:gqa"]
    assert run(tmp_path, *gqa, f"--match={CONFIG}", f"--match_by={by}") == 0
    assert run(tmp_path, f"--config={CONFIG}") == 0
    matched, reference = trained
    assert matched.attention == dense_twin(reference).attention

    def quantity(config):
        if by == "params":
            return cost.parameter_count(config).active
        return cost.training_flops(config, config.data.sequence_length).total

    assert quantity(matched) == pytest.approx(quantity(reference), rel=5e-3)
    assert matched.moe.expert_dim != reference.moe.expert_dim
    line = f"matched with {CONFIG}: moe.expert_dim 128 -> {matched.moe.expert_dim}: "
    assert line in capsys.readouterr().out


def test_the_field_can_be_named(trained, tmp_path):
    arguments = ["--config.attention.top_k=4", f"--match={CONFIG}:gqa"]
    code = run(tmp_path, f"--config={CONFIG}", *arguments, "--match_field=attention.top_k")
    assert code == 0
    assert trained[0].attention.top_k > 8
    assert trained[0].moe.expert_dim == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match=nowhere.py"], "--match=nowhere.py: there is no file 'nowhere.py'"),
        (["--match_field=attention.top_k"], "--match_field needs --match"),
        (["--match_by=params"], "--match_by needs --match"),
        ([f"--match={CONFIG}", "--match_by=time"], "match_by"),
        (
            [f"--match={CONFIG}:gqa", "--match_by=params", "--match_field=attention.top_k"],
            "attention.top_k=8: active parameters do not depend on it",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, trained, tmp_path, capsys):
    assert run(tmp_path, f"--config={CONFIG}", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert trained == []
