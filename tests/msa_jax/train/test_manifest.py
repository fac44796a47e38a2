"""The manifest says what ran, with git, without git and on resume."""

import json
import subprocess

import jax
import pytest

from msa_jax.train.config import ExperimentConfig
from msa_jax.train.manifest import git_state, write_manifest


def git(directory, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_each_start_is_added_with_what_ran(tmp_path):
    config = ExperimentConfig()
    write_manifest(tmp_path, config)
    write_manifest(tmp_path, config, resumed_from_step=5)
    first, second = json.loads((tmp_path / "manifest.json").read_text())["starts"]
    assert first["config"]["attention"]["top_k"] == config.attention.top_k
    assert first["packages"]["jax"] == jax.__version__
    assert None not in first["packages"].values()
    assert first["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert first["command"][1:]
    assert (first["resumed_from_step"], second["resumed_from_step"]) == (None, 5)


def test_git_state_follows_the_checkout(tmp_path):
    source = tmp_path / "code.py"
    source.write_text("x = 1\n")
    git(tmp_path, "init")
    assert git_state(source) is None, "not tracked yet"
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "add")
    state = git_state(source)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    untracked = tmp_path / "ignored.py"
    untracked.write_text("x = 1\n")
    assert git_state(untracked) is None, "the checkout around an installed package is not its own"
    source.write_text("x = 2\n")
    assert git_state(source) == {"commit": state["commit"], "dirty": True}


@pytest.mark.parametrize("path", ["", "absent"])
def test_no_checkout_and_no_git_are_no_failure(tmp_path, monkeypatch, path):
    source = tmp_path / "code.py"
    source.write_text("x = 1\n")
    if path:
        monkeypatch.setenv("PATH", path)
    assert git_state(source) is None
