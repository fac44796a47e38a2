"""What the sections of a run's config refuse, each error naming the field and the mend."""

import pytest

from msa_jax.config import ConfigError
from msa_jax.train.config import DataConfig, ExperimentConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_length": 0}, r"data\.warmup_length=0: must be >= 1"),
        ({"length_warmup_steps": -1}, r"data\.length_warmup_steps=-1: must be >= 0"),
        (
            {"sequence_length": 1024, "warmup_length": 384, "length_warmup_steps": 1},
            r"data\.warmup_length=384: must divide data\.sequence_length=1024",
        ),
        (
            {"sequence_length": 1024, "warmup_length": 64, "length_warmup_steps": 1},
            r"data\.warmup_length=64: must be a multiple of attention\.block_size=128",
        ),
    ],
)
def test_short_rows_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(data=DataConfig(**fields))


def test_a_length_that_no_step_has_may_be_any():
    ExperimentConfig(data=DataConfig(sequence_length=1024, warmup_length=384))
