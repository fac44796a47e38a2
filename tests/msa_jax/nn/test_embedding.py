"""Embedding and output head, tied and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.nn.embedding import Embedding


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
