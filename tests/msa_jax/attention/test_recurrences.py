"""The recurrences of linear attention and Mamba-2 against their definition, token by token.

The oracle is numpy-like code in float64 that writes the equations down, document by document; its
gradients are jax's. It shares no code with the library.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.attention.chunks import product_in
from msa_jax.attention.delta_rule import delta_rule, delta_rule_step, inverse_of_unit_lower
from msa_jax.attention.ssd import state_space, state_space_step
from pallas_kernels.residuals import OUTPUT

BATCH, LENGTH, HEADS, ROWS, COLUMNS = 2, 21, 2, 4, 3
# Documents of row 0 and row 1 with padding behind them; the first finds the initial state.
SPANS = (((0, 5), (8, 21)), ((0, 9), (9, 10), (10, 19)))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def segments():
    ids = np.zeros((BATCH, LENGTH), np.int32)
    for row, spans in enumerate(SPANS):
        for number, (start, stop) in enumerate(spans):
            ids[row, start:stop] = 7 - number
    return ids


def delta_token(state, q, k, v, log_decay, beta):
    """S_t = a (I - beta k k^T) S + beta k v^T, o = S_t^T q; one head."""
    state = jnp.exp(log_decay) * (jnp.eye(len(k)) - beta * jnp.outer(k, k)) @ state
    state = state + beta * jnp.outer(k, v)
    return state.T @ q, state


def state_space_token(state, x, b, c, log_decay):
    """S_t = a S + x b^T, y = S_t c; one head."""
    state = jnp.exp(log_decay) * state + jnp.outer(x, b)
    return state @ c, state


def delta_inputs(rng):
    q, k = rng.normal(size=(2, BATCH, LENGTH, HEADS, ROWS))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(BATCH, LENGTH, HEADS, COLUMNS))
    log_decay = -rng.exponential(size=(BATCH, LENGTH, HEADS))
    return q, k, v, log_decay, rng.uniform(size=(BATCH, LENGTH, HEADS))


def state_space_inputs(rng):
    x = rng.normal(size=(BATCH, LENGTH, HEADS, ROWS))
    b, c = rng.normal(size=(2, BATCH, LENGTH, COLUMNS))
    return x, b, c, -rng.exponential(size=(BATCH, LENGTH, HEADS))


# What a head's token takes of each argument: its own, or what all heads share.
RECURRENCES = {
    "delta rule": (delta_rule, delta_rule_step, delta_token, delta_inputs, (1, 1, 1, 1, 1)),
    "state space": (
        state_space,
        state_space_step,
        state_space_token,
        state_space_inputs,
        (1, 0, 0, 1),
    ),
}


@pytest.fixture(params=RECURRENCES, scope="module")
def recurrence(request):
    return RECURRENCES[request.param]


def oracle(token, per_head, arrays, initial_state):
    """Outputs and last states of every row and head; tokens of padding give 0."""
    begins, real = np.zeros((2, BATCH, LENGTH), bool)
    for row, spans in enumerate(SPANS):
        for number, (start, stop) in enumerate(spans):
            begins[row, start] = number > 0
            real[row, start:stop] = True

    def step(state, inputs):
        begins, real, *own = inputs
        o, new = token(jnp.where(begins, 0, state), *own)
        return jnp.where(real, new, state), jnp.where(real, o, 0)

    def head(state, begins, real, *own):
        state, o = jax.lax.scan(step, state, (begins, real, *own))
        return o, state

    heads = jax.vmap(head, (0, None, None, *(1 if h else None for h in per_head)), (1, 0))
    return jax.vmap(heads)(initial_state, begins, real, *arrays)


def weighted(function, seed=3):
    """A scalar of a function's two results, for gradients."""

    def scalar(arrays, initial_state):
        results = function(arrays, initial_state)
        rng = np.random.default_rng(seed)
        return sum((jnp.asarray(rng.normal(size=a.shape)) * a).sum() for a in results), results

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))


def test_values_and_gradients_are_the_definitions(recurrence, float64):
    """In chunks of which documents, padding and row end inside one; values also in one chunk."""
    chunked, _, token, make_inputs, per_head = recurrence
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(a) for a in make_inputs(rng))
    state = jnp.asarray(rng.normal(size=(BATCH, HEADS, ROWS, COLUMNS)))
    expected = weighted(functools.partial(oracle, token, per_head))(arrays, state)

    def run(arrays, state, chunk_size=4):
        options = {"initial_state": state, "chunk_size": chunk_size}
        return chunked(*arrays, segment_ids=jnp.asarray(segments()), **options)

    actual = weighted(run)(arrays, state)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    (_, values), _ = expected
    again = jax.jit(functools.partial(run, chunk_size=64))(arrays, state)
    for a, b in zip(again, values, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_states_pass_between_groups_of_chunks(recurrence, float64, monkeypatch):
    """Eleven chunks in groups of two, groups of groups, and so on; the last of each is not full."""
    chunked, _, token, make_inputs, per_head = recurrence
    for module in ("delta_rule", "ssd"):
        monkeypatch.setattr(f"msa_jax.attention.{module}._GROUP", 2)
    rng = np.random.default_rng(4)
    arrays = tuple(jnp.asarray(a) for a in make_inputs(rng))
    state = jnp.asarray(rng.normal(size=(BATCH, HEADS, ROWS, COLUMNS)))
    expected = weighted(functools.partial(oracle, token, per_head))(arrays, state)

    def run(arrays, state):
        options = {"initial_state": state, "chunk_size": 2}
        return chunked(*arrays, segment_ids=jnp.asarray(segments()), **options)

    actual = weighted(run)(arrays, state)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_steps_are_the_definition(recurrence, float64):
    _, step, token, make_inputs, per_head = recurrence
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(a[:, 0]) for a in make_inputs(rng)]
    state = jnp.asarray(rng.normal(size=(BATCH, HEADS, ROWS, COLUMNS)))
    o, new = step(state, *arrays)
    for row, head in np.ndindex(BATCH, HEADS):
        own = [a[row, head] if h else a[row] for a, h in zip(arrays, per_head, strict=True)]
        expected = token(state[row, head], *own)
        np.testing.assert_allclose(o[row, head], expected[0], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(new[row, head], expected[1], rtol=1e-12, atol=1e-12)


def test_decays_that_vanish_give_no_nan(recurrence):
    """Gates shut for good beside gates wide open, in float32: products of decays underflow."""
    chunked, _, _, make_inputs, _ = recurrence
    arrays = [jnp.asarray(a, jnp.float32) for a in make_inputs(np.random.default_rng(2))]
    gate = 3 if chunked is delta_rule else -1
    arrays[gate] = jnp.where(jnp.arange(LENGTH)[:, None] % 3 == 0, -1e4, -1e-6) + 0 * arrays[gate]
    state = jnp.ones((BATCH, HEADS, ROWS, COLUMNS))

    def run(arrays, state):
        return chunked(*arrays, initial_state=state, chunk_size=8)

    (_, (o, _)), gradients = weighted(run)(tuple(arrays), state)
    for leaf in jax.tree.leaves((o, gradients)):
        assert np.isfinite(leaf).all()
    # Token 3 forgot all before it: alone it gives the same.
    alone, _ = jax.jit(chunked)(*(a[:, 3:6] for a in arrays))
    np.testing.assert_allclose(o[:, 3:6], alone, rtol=1e-4, atol=1e-5)


def test_chunks_that_forget_much_blur_no_later_ones(recurrence):
    """In float32, whose sum of all their log decays would have no digit behind the point."""
    chunked, _, _, make_inputs, _ = recurrence
    arrays = [jnp.asarray(a, jnp.float32) for a in make_inputs(np.random.default_rng(6))]
    gate = 3 if chunked is delta_rule else -1
    arrays[gate] = jnp.full_like(arrays[gate], -0.1)
    run = jax.jit(functools.partial(chunked, chunk_size=1))
    alone = run(*(a[:, 9:] for a in arrays))
    arrays[gate] = arrays[gate].at[:, :10].set(-1e7)
    for a, b in zip(run(*arrays), alone, strict=True):
        np.testing.assert_allclose(a[:, -12:], b[:, -12:], rtol=1e-4, atol=1e-5)


def test_the_inverse_is_exact_where_powers_would_overflow_its_precision():
    """All entries 1: the powers of L reach 1e18, the inverse has 1 and -1."""
    lower = jnp.tril(jnp.ones((64, 64), jnp.float32), -1)
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(jax.jit(inverse_of_unit_lower)(lower), expected)


def test_memory_is_linear_in_the_length(recurrence):
    """Of value and gradient; a number per pair of tokens would already be twice as much."""
    chunked, _, _, make_inputs, _ = recurrence
    length = 8192
    arrays = make_inputs(np.random.default_rng(0))
    shapes = tuple(jax.ShapeDtypeStruct((1, length, *a.shape[2:]), jnp.float32) for a in arrays)
    gradient = jax.jit(jax.grad(lambda arrays: chunked(*arrays, chunk_size=8)[0].sum()))
    memory = gradient.lower(shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length**2 * 4 / 2


def test_products_of_the_backward_pass_are_as_narrow_as_their_operands():
    """A float32 cotangent of bfloat16 operands would take them off a GPU's tensor cores."""
    a, b = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((2, 4, 5), jnp.float32)
    product = product_in(a.dtype)
    gradient = jax.jit(jax.grad(lambda a, b: product("bij,bjk->bik", a, b).sum(), (0, 1)))
    assert [g.dtype for g in gradient(a, b)] == [jnp.bfloat16, jnp.float32]
    lines = gradient.lower(a, b).as_text().splitlines()
    products = [line.split(" : ")[1] for line in lines if "dot_general" in line]
    assert len(products) == 2
    for types in products:
        assert types.split("->")[0].count("bf16") == 2


def test_a_layer_that_keeps_what_is_named_computes_no_product_again(recurrence):
    """But those that the recurrence itself would do again, in a layer that keeps everything."""
    chunked, _, _, make_inputs, _ = recurrence
    arrays = [jnp.asarray(a, jnp.float32) for a in make_inputs(np.random.default_rng(5))]

    def layer(*arrays):
        return (chunked(*arrays, chunk_size=4)[0] ** 2).sum()

    def products(layer):
        gradient = jax.jit(jax.value_and_grad(layer, range(len(arrays))))
        return gradient.lower(*arrays).as_text().count("dot_general")

    keeping = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(OUTPUT))
    assert products(keeping) == products(layer) < products(jax.checkpoint(layer))
