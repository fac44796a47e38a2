import dataclasses
import importlib

import pytest

from msa_jax.config import ConfigError
from msa_jax.data.tokenizer import ByteTokenizer
from msa_jax.train.config import ExperimentConfig, from_config_dict

NAMES = ["quickstart", "h100_350m", "pilot_10b", "msa_109b", "minimax_m3"]


def load(name: str, *arguments: str) -> ExperimentConfig:
    config = importlib.import_module(f"configs.{name}").get_config(*arguments)
    return from_config_dict(ExperimentConfig, config)


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_differs_in_the_mixer_alone(name):
    msa, twin = load(name), load(name, "gqa")
    assert (msa.attention.kind, twin.attention.kind) == ("msa", "gqa")
    assert twin == dataclasses.replace(
        msa, attention=dataclasses.replace(msa.attention, kind="gqa")
    )
    assert load(name, "") == msa


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_one_clear_error(name):
    with pytest.raises(ConfigError, match=r"config argument 'gpa': .*\"gqa\" for the dense twin"):
        load(name, "gpa")


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_gives_command_hardware_and_result(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    for part in (
        f"python -m experiments.train --config=configs/{name}.py",
        f"configs/{name}.py:gqa",
        "Hardware:",
        "Expected result:",
    ):
        assert part in text


def test_the_quickstart_speaks_bytes():
    config = load("quickstart")
    assert config.data.tokenizer == "byte"
    assert config.model.vocab_size == ByteTokenizer.vocab_size


def test_minimax_m3_has_three_full_attention_layers_without_experts():
    config = load("minimax_m3")
    kinds = [config.attention_of(layer).kind for layer in range(60)]
    experts = [config.has_experts(layer) for layer in range(60)]
    assert kinds == ["gqa"] * 3 + ["msa"] * 57
    assert experts == [False] * 3 + [True] * 57
