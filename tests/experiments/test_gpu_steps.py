"""Whole models lowered for an H100 that is not there: who selects blocks attends by kernels."""

import pytest

from configs.comparison import get_config
from experiments.compiling.steps import lower_step
from experiments.compiling.targets import parse_target
from msa_jax.train.config import ExperimentConfig, from_config_dict

# How often each kernel is called in a step whose backward pass attends again, or need not.
ONCE = {"union": 1, "partial_attention": 1, "combine": 2, "block_gradients": 1, "add_parts": 1}
TWICE = ONCE | {"union": 2, "partial_attention": 2, "combine": 3}


@pytest.mark.parametrize(
    ("kind", "remat", "calls"),
    [
        ("", "save_selection", TWICE),
        ("", "full", TWICE),
        ("", "dots", ONCE),
        ("", "attention", ONCE),
        ("", "none", ONCE),
        ("longformer", "save_selection", TWICE),
        ("bigbird", "save_selection", TWICE),
    ],
)
def test_sparse_training_step(kind, remat, calls):
    """What attends again does all of it again, both schemes; it reads no result that is not there.

    Block ids may follow from activations, or from their places alone.
    """
    config = get_config(kind)
    config.model.num_layers, config.model.remat = 2, remat
    config.data.sequence_length = 1024
    lowered = lower_step(from_config_dict(ExperimentConfig, config), parse_target("h100"), "sparse")
    kernels = [line for line in lowered.as_text().splitlines() if "@mosaic_gpu_v2" in line]
    found = {name: sum(f"{name}\\00" in kernel for kernel in kernels) for name in calls}
    assert found == calls
