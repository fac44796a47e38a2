"""Published sizes, and the analytic count against the model's own arrays; nothing is allocated."""

import dataclasses
import importlib
import math

import jax
import pytest
from flax import nnx

from msa_jax.config import ArchitectureConfig, dense_twin
from msa_jax.cost import parameter_count
from msa_jax.model import Transformer
from msa_jax.train.config import ExperimentConfig, from_config_dict

NAMES = ["quickstart", "h100_350m", "pilot_10b", "msa_109b", "minimax_m3"]


def load(name: str, arg: str) -> ArchitectureConfig:
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    return from_config_dict(ExperimentConfig, config).architecture


def model_parameters(config: ArchitectureConfig) -> int:
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    return sum(map(math.prod, shapes))


@pytest.mark.parametrize("arg", ["", "gqa"])
@pytest.mark.parametrize("name", NAMES)
def test_the_analytic_count_is_the_models(name, arg):
    config = load(name, arg)
    assert parameter_count(config).total == model_parameters(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": False},
        {"index_norm": False},
        {"share_every": 2},
        {"selector": "random"},
        {"num_kv_heads": 4},
    ],
    ids=str,
)
def test_the_analytic_count_follows_the_attention_fields(changes):
    config = load("quickstart", "")
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, **changes))
    assert parameter_count(config).total == model_parameters(config)


@pytest.mark.parametrize("field", ["moe.num_experts", "moe.num_shared_experts"])
def test_the_analytic_count_follows_the_feed_forward(field):
    section, name = field.split(".")
    config = load("quickstart", "")
    part = dataclasses.replace(getattr(config, section), **{name: 0})
    config = dataclasses.replace(config, **{section: part})
    assert parameter_count(config).total == model_parameters(config)


def test_pilot_matches_the_paper():
    """10.53B and 1.47B active, embedding included, are met exactly by the dense twin.

    The index branch adds 21M, so the MSA model itself has 10.55B and 1.49B.
    """
    count = parameter_count(load("pilot_10b", "gqa"))
    assert f"{count.total / 1e9:.2f} {count.active / 1e9:.2f}" == "10.53 1.47"
    msa = parameter_count(load("pilot_10b", ""))
    assert msa.total - count.total == msa.active - count.active == 16 * (2048 * 5 * 128 + 2 * 128)
    assert f"{msa.total / 1e9:.2f} {msa.active / 1e9:.2f}" == "10.55 1.49"


def test_main_model_is_within_2_percent_of_109b():
    """The published 6B active leaves out embedding and head: 6.49B without them, 7.72B with."""
    count = parameter_count(load("msa_109b", ""))
    assert count.total == pytest.approx(109e9, rel=0.02)
    assert f"{count.active_non_embedding / 1e9:.2f} {count.active / 1e9:.2f}" == "6.49 7.72"


def test_minimax_m3_matches_the_release():
    """426B text parameters (428B with the vision tower); 23.5B active leave out the embeddings."""
    count = parameter_count(load("minimax_m3", ""))
    assert f"{count.total / 1e9:.0f} {count.active_non_embedding / 1e9:.1f}" == "426 23.5"
    assert f"{count.active / 1e9:.1f}" == "26.0"


def test_twins_differ_by_the_index_branch_alone():
    for name in NAMES:
        config = load(name, "")
        msa, dense = parameter_count(config), parameter_count(dense_twin(config))
        assert dense.index == 0 < msa.index
        norms = msa.norms - dense.norms
        assert msa.total - dense.total == msa.index + norms
