"""The sections of `AttentionConfig`: what they refuse, and their way through ml-collections."""

import dataclasses

import pytest

from msa_jax.config import AttentionConfig, ConfigError
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig
from msa_jax.train.checkpoint import CheckpointError, check_config
from msa_jax.train.config import ExperimentConfig, from_config_dict, to_config_dict

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("section", "field", "value", "mend"),
    [
        (MLAConfig, "latent_dim", 0, "must be >= 1"),
        (MLAConfig, "query_latent_dim", -1, "must be >= 0"),
        (MLAConfig, "value_dim", -1, "must be >= 0"),
        (MLAConfig, "rope_head_dim", 3, "must be even and >= 0"),
        (MLAConfig, "rope_head_dim", -2, "must be even and >= 0"),
        (LinearConfig, "value_dim", -1, "must be >= 0"),
        (LinearConfig, "conv_width", 0, "must be >= 1"),
        (LinearConfig, "chunk_size", 0, "must be >= 1"),
        (LinearConfig, "chunk_size", 48, "must be a power of two"),
        (Mamba2Config, "state_dim", 0, "must be >= 1"),
        (Mamba2Config, "expand", 0, "must be >= 1"),
        (Mamba2Config, "head_dim", 0, "must be >= 1"),
        (Mamba2Config, "conv_width", 0, "must be >= 1"),
        (Mamba2Config, "chunk_size", 0, "must be >= 1"),
    ],
)
def test_a_bad_value_names_its_field_and_the_mend(section, field, value, mend):
    name = {MLAConfig: "mla", LinearConfig: "linear", Mamba2Config: "mamba2"}[section]
    with pytest.raises(ConfigError) as error:
        section(**{field: value})
    assert str(error.value) == f"attention.{name}.{field}={value}: {mend}"


def test_a_value_dim_of_0_is_the_head_dim():
    assert AttentionConfig(head_dim=96).mla_value_dim == 96
    assert AttentionConfig(head_dim=96).linear_value_dim == 96
    config = AttentionConfig(mla=MLAConfig(value_dim=3), linear=LinearConfig(value_dim=5))
    assert (config.mla_value_dim, config.linear_value_dim) == (3, 5)


def edited(**values):
    """A config after edits of nested fields, as the command line makes them."""
    config = to_config_dict(ExperimentConfig())
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in values.items()})
    return from_config_dict(ExperimentConfig, config)


def test_nested_sections_go_through_a_config_dict():
    config = edited(attention__mla__latent_dim=8, attention__mamba2__expand=3)
    assert config.attention.mla == MLAConfig(latent_dim=8)
    assert config.attention.mamba2 == Mamba2Config(expand=3)
    assert config.attention.linear == LinearConfig()
    assert from_config_dict(ExperimentConfig, dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mla": {"latent": 8}}, r"attention\.mla\.latent: no such field; .* has latent_dim, "),
        ({"mla": 8}, r"attention\.mla=8: must be a section with fields"),
        ({"mla": {"latent_dim": "many"}}, r"attention\.mla\.latent_dim='many': must be of type"),
        ({"mla": {"latent_dim": 0}}, r"attention\.mla\.latent_dim=0: must be >= 1"),
    ],
)
def test_a_wrong_nested_value_names_its_whole_path(values, message):
    with pytest.raises(ConfigError, match=message):
        from_config_dict(ExperimentConfig, {"attention": values})


def test_a_checkpoint_of_other_nested_fields_is_refused_by_name():
    saved = ExperimentConfig()
    # What changes speed alone may differ.
    check_config(saved, edited(attention__linear__chunk_size=32), source="somewhere")
    with pytest.raises(CheckpointError, match=r"attention\.mla\.latent_dim: checkpoint 512, con"):
        check_config(saved, edited(attention__mla__latent_dim=8), source="somewhere")
