"""Experiment configurations, one file per model; see each docstring for its command."""

import ml_collections

from msa_jax.config import ConfigError, dense_twin
from msa_jax.train.config import ExperimentConfig, to_config_dict


def select_variant(config: ExperimentConfig, arg: str) -> ml_collections.ConfigDict:
    """The variant of `config` that the text after `configs/NAME.py:` asks for.

    Args:
      config: the MSA run.
      arg: "" for `config` itself, "gqa" for its dense twin.

    Raises:
      ConfigError: any other `arg`.
    """
    variants = {"": config, "gqa": dense_twin(config)}
    if arg not in variants:
        raise ConfigError(
            f'config argument {arg!r}: use no argument for MSA, or "gqa" for the dense twin'
        )
    return to_config_dict(variants[arg])
