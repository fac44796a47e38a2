"""Whole models lowered for an H100 that is not there: who selects blocks attends by kernels."""

import pytest

from configs.comparison import get_config
from experiments.compiling.steps import lower_step
from experiments.compiling.targets import parse_target
from msa_jax.train.config import ExperimentConfig, from_config_dict

KERNELS = ("union", "partial_attention", "combine", "block_gradients")


@pytest.mark.parametrize("kind", ["", "longformer", "bigbird"])
def test_sparse_training_step(kind):
    """Two layers, rematerialised: ids may follow from activations, or from their places alone."""
    config = get_config(kind)
    config.model.num_layers = 2
    config.data.sequence_length = 1024
    lowered = lower_step(from_config_dict(ExperimentConfig, config), parse_target("h100"), "sparse")
    text = lowered.as_text()
    assert [name for name in KERNELS if f"{name}\\00" not in text] == []
