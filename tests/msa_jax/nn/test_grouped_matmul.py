"""Grouped matmul: both implementations against a loop over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from msa_jax.nn.grouped_matmul import apply_grouped

ROWS, GROUPS, INNER = 150, 4, 5  # more than two tiles of 64 rows
IMPLEMENTATIONS = ("ragged_dot", "tiles")
GROUP_SIZES = {
    "uneven": [1, 70, 64, 15],
    "empty groups": [0, 150, 0, 0],
    "empty at the ends": [0, 40, 110, 0],
    "rows of nobody": [30, 0, 65, 20],
    "all rows of nobody": [0, 0, 0, 0],
}


def weights():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(GROUPS, 3, INNER)), rng.normal(size=(GROUPS, INNER, 2))
    return first.astype(np.float32), second.astype(np.float32)


def rows():
    return np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32)


def loss(x, first, second, group_sizes, out_weights, implementation):
    def fn(rows, matmul):
        # The cosine of a row of nobody is not 0, as a product of such a row may well be.
        return jnp.cos(matmul(jnp.tanh(matmul(rows, first)), second))

    y = apply_grouped(fn, x, group_sizes, implementation=implementation)
    return (y * out_weights).sum(), y


run = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="implementation"
)


def loop(x, first, second, group_sizes, out_weights):
    """y, and the gradients of sum(y * out_weights) in x and both weights."""
    x, first, second = (a.astype(float) for a in (x, first, second))
    y = np.zeros((ROWS, 2))
    dx, dfirst, dsecond = np.zeros_like(x), np.zeros_like(first), np.zeros_like(second)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), group_sizes)):
        hidden = np.tanh(x[row] @ first[group])
        outer = hidden @ second[group]
        y[row] = np.cos(outer)
        douter = -np.sin(outer) * out_weights[row]
        dinner = second[group] @ douter * (1 - hidden**2)
        dx[row] = first[group] @ dinner
        dfirst[group] += np.outer(x[row], dinner)
        dsecond[group] += np.outer(hidden, douter)
    return y, (dx, dfirst, dsecond)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group_sizes", GROUP_SIZES.values(), ids=GROUP_SIZES)
def test_value_and_gradients_are_those_of_a_loop(implementation, group_sizes):
    out_weights = np.random.default_rng(2).normal(size=(ROWS, 2)).astype(np.float32)
    arguments = (rows(), *weights(), np.array(group_sizes, np.int32), out_weights)
    (_, y), gradients = run(*arguments, implementation=implementation)
    expected, expected_gradients = loop(*arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for gradient, numpy_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, numpy_gradient, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_nobody_stay_out_of_values_and_gradients(implementation):
    """Whatever they hold; an implementation may leave what it computes of them undefined."""
    x = rows()
    x[115:] = np.nan
    group_sizes = np.array(GROUP_SIZES["rows of nobody"], np.int32)
    ones = np.ones((ROWS, 2), np.float32)
    (_, y), gradients = run(x, *weights(), group_sizes, ones, implementation=implementation)
    expected, expected_gradients = loop(x, *weights(), group_sizes, ones)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for gradient, numpy_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, numpy_gradient, rtol=1e-5, atol=1e-4)


def test_unknown_implementation_is_an_error_that_names_the_choices():
    group_sizes = jnp.zeros(GROUPS, jnp.int32)
    with pytest.raises(ValueError, match="implementation='loop': choose ragged_dot or tiles"):
        apply_grouped(lambda x, _: x, jnp.asarray(rows()), group_sizes, implementation="loop")


def test_what_runs_is_for_the_devices_that_are_traced_for():
    """Tiles are for CPUs: a step that is compiled here for TPUs is to be the one that they run."""

    def operations():
        arguments = jnp.asarray(rows()), *weights(), jnp.asarray(GROUP_SIZES["uneven"])
        return str(jax.make_jaxpr(lambda *x: loss(*x, 1.0, None))(*arguments))

    tpu = AbstractDevice("TPU v5", 2, "tpu")
    assert "ragged_dot" not in operations()
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=tpu)):
        assert "ragged_dot" in operations()
