"""The models of `configs/comparison.py` are as large, and as expensive, as they say."""

import pytest

from configs import comparison
from msa_jax import cost
from msa_jax.config import ConfigError
from msa_jax.train.config import ExperimentConfig, from_config_dict

LENGTH = 8192


def load(arg: str) -> ExperimentConfig:
    return from_config_dict(ExperimentConfig, comparison.get_config(arg))


@pytest.mark.parametrize("kind", comparison._FIELDS)
def test_every_model_has_as_many_parameters(kind):
    msa, other = load(""), load(kind)
    assert other.attention.kind == kind
    active = cost.parameter_count(msa).active
    assert active > 30e6
    assert cost.parameter_count(other).active == pytest.approx(active, rel=0.005)
    assert (other.data, other.optimizer, other.train) == (msa.data, msa.optimizer, msa.train)


def test_a_window_costs_what_msa_costs():
    own, other = (
        cost.training_flops_per_token(load(arg), LENGTH).sparse for arg in ("", "sliding_window")
    )
    assert other == pytest.approx(own, rel=0.005)


def test_continued_pretraining_starts_from_the_gqa_model():
    gqa, continued = load("gqa"), load("cpt")
    assert continued.attention.kind == "msa"
    assert continued.model == gqa.model
    assert continued.attention.dense == gqa.attention
    assert continued.train.init_from.endswith("/gqa_0")
    assert continued.data.seed not in (0, 1)  # not the order of the GQA models again


def test_an_unknown_mixer_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"config argument 'rnn': .* or one of gqa, mha, "):
        comparison.get_config("rnn")
