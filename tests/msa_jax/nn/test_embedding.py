"""Embedding and output head, tied and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.nn.embedding import Embedding
from msa_jax.sharding import make_mesh


@pytest.mark.parametrize("tied", [True, False])
def test_rows_in_and_logits_out(tied, filled):
    embedding = filled(lambda rngs: Embedding(7, 4, tied=tied, rngs=rngs))
    tokens = np.array([[0, 6, 3]], np.int32)
    table = np.asarray(embedding.table[...])
    np.testing.assert_array_equal(embedding.encode(jnp.asarray(tokens)), table[tokens])
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    head = table.T if tied else np.asarray(embedding.head[...])
    assert (embedding.head is None) == tied
    np.testing.assert_allclose(embedding.decode(jnp.asarray(x)), x @ head, rtol=1e-5, atol=1e-6)


def test_logits_are_float32_of_a_matmul_in_dtype(filled):
    embedding = filled(lambda rngs: Embedding(7, 4, tied=True, dtype="bfloat16", rngs=rngs))
    tokens = jax.eval_shape(embedding.encode, jnp.zeros((1, 3), jnp.int32))
    assert tokens.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(embedding.decode)(jnp.zeros((1, 3, 4), jnp.bfloat16))
    assert jaxpr.out_avals[0].dtype == jnp.float32
    (matmul,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert {str(value.aval.dtype) for value in matmul.invars} == {"bfloat16"}


def test_a_small_table_in_16_bits_sums_its_gradient_in_float32(filled):
    """Added one by one in bfloat16, ones stop at 256."""
    embedding = filled(lambda rngs: Embedding(7, 4, tied=True, dtype="bfloat16", rngs=rngs))
    tokens = jnp.asarray(np.array([[0, 6] + [3] * 4096 + [9, -1]], np.int32))
    table = embedding.table[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(embedding.encode(tokens), table[jnp.clip(tokens, 0, 6)])

    def total(embedding):
        return embedding.encode(tokens).astype(jnp.float32).sum()

    gradient = np.asarray(jax.grad(total)(embedding).table[...])
    np.testing.assert_array_equal(gradient[:, 0], [2, 0, 0, 4096, 0, 0, 2])


def test_a_small_table_in_16_bits_on_a_mesh(filled):
    make = filled(lambda rngs: Embedding(8, 4, tied=True, dtype="bfloat16", rngs=rngs))
    tokens = np.random.default_rng(0).integers(0, 8, (4, 6)).astype(np.int32)

    def total(embedding, tokens):
        x = embedding.encode(tokens).astype(jnp.float32)
        return (x * jnp.arange(4)).sum(), x

    expected = jax.jit(jax.value_and_grad(total, has_aux=True))(make, tokens)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None)))
        table = jax.device_put(make.table[...], jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
        make.table.set_value(table)
        found = jax.jit(jax.value_and_grad(total, has_aux=True))(make, placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-2)
