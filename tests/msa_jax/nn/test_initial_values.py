"""What fresh parameters look like."""

import jax
import numpy as np
import pytest
from flax import nnx

from msa_jax.nn.param import gain, matrix


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_matrices_have_the_promised_deviation_and_no_outliers(scale):
    make = jax.jit(
        lambda: matrix(
            nnx.Rngs(0), (100, 400), ("embed", "mlp"), fan_in=100, dtype="float32", scale=scale
        )
    )
    param = make()
    values = np.asarray(param[...])
    deviation = scale / 10
    assert values.std() == pytest.approx(deviation, rel=0.02)
    assert abs(values.mean()) < 0.02 * deviation
    assert 2 * deviation < np.abs(values).max() < 2.3 * deviation
    assert param.get_metadata("logical_axes") == ("embed", "mlp")


def test_dtype_is_of_the_stored_values():
    assert gain(3, "bfloat16").dtype == "bfloat16"
    weights = jax.eval_shape(
        lambda: matrix(nnx.Rngs(0), (2, 2), (None, None), fan_in=2, dtype="bfloat16")
    )
    assert weights.dtype == "bfloat16"
