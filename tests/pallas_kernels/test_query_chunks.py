"""The references work through queries in chunks: the same results, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_op import OPS, inputs
from op_cases import (
    BATCH,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KEYS,
    NUM_KV_HEADS,
    PACKED,
    assert_close,
    compiled,
    normal,
)

from pallas_kernels import (
    BlockSelection,
    dense_attention,
    index_kl,
    select_blocks,
    select_pattern,
    sparse_attention,
    visibility,
)

# Of float64: what each op says that one query of the whole batch takes.
MAIN_BYTES = 8 * BATCH * NUM_HEADS * NUM_KEYS
INDEX_BYTES = 8 * BATCH * NUM_KV_HEADS * NUM_KEYS
PATTERN_BYTES = 4 * BATCH * NUM_KV_HEADS * NUM_BLOCKS
QUERY_BYTES = {
    "sparse_attention": MAIN_BYTES,
    "dense_attention, window": MAIN_BYTES,
    "index_kl, selected": MAIN_BYTES,
    "index_kl, dense": MAIN_BYTES,
    "select_blocks": INDEX_BYTES,
    "select_blocks, lse": INDEX_BYTES,
    "strided": PATTERN_BYTES,
    "random": PATTERN_BYTES,
    "oracle": PATTERN_BYTES,
}


def weighted_sum(results):
    return sum((jnp.where(jnp.isfinite(x), x, 0) * normal(0, *x.shape)).sum() for x in results)


def results_and_gradients(op, x):
    """Compiled afresh: the chunk size is no argument. Block ids have no gradient."""

    def run(x):
        results = OPS[op](x, PACKED.arrays(), {})
        if results[0].dtype == jnp.int32:
            return results, ()
        return results, jax.grad(lambda x: weighted_sum(OPS[op](x, PACKED.arrays(), {})))(x)

    return compiled(run)(x)


@pytest.mark.parametrize("op", QUERY_BYTES)
def test_chunks_change_nothing(op, monkeypatch, double_precision):
    """One query at a time, and chunks that leave a remainder."""
    shapes = []
    map_in_sequence = jax.lax.map

    def recording(fn, arrays):
        shapes.extend(array.shape for array in jax.tree.leaves(arrays))
        return map_in_sequence(fn, arrays)

    monkeypatch.setattr(jax.lax, "map", recording)
    x = inputs("float64")
    whole = jax.tree.leaves(results_and_gradients(op, x))
    assert not shapes
    for chunk in (1, 7):
        shapes.clear()
        monkeypatch.setattr(visibility, "CHUNK_BYTES", chunk * QUERY_BYTES[op])
        for actual, expected in zip(
            jax.tree.leaves(results_and_gradients(op, x)), whole, strict=True
        ):
            if actual.dtype == jnp.int32:
                np.testing.assert_array_equal(actual, expected)
            else:
                assert_close(actual, expected)
        assert {shape[:3] for shape in shapes} >= {(-(-NUM_KEYS // chunk), BATCH, chunk)}


TOKENS = 32 * 1024


def abstract(dtype, *shape):
    return jax.ShapeDtypeStruct((1, TOKENS, *shape), dtype)


def arguments(dtype):
    """Of the paper's shape: 64 query heads, 4 KV heads, head and index dim 128, K 16, Bk 128."""
    return {
        "q": abstract(dtype, 64, 128),
        "k": abstract(dtype, 4, 128),
        "v": abstract(dtype, 4, 128),
        "index_q": abstract(dtype, 4, 128),
        "index_k": abstract(dtype, 128),
        "block_ids": jax.ShapeDtypeStruct((1, 4, TOKENS, 16), jnp.int32),
    }


BOUNDED = {
    "select_blocks": lambda x: select_blocks(x["index_q"], x["index_k"]),
    "select_pattern": lambda x: select_pattern("oracle", x["q"], x["k"]),
    "sparse_attention": lambda x: sparse_attention(
        x["q"], x["k"], x["v"], BlockSelection(x["block_ids"], 128)
    ),
    "dense_attention": lambda x: dense_attention(x["q"], x["k"], x["v"], return_lse=True),
    "index_kl": lambda x: index_kl(
        x["q"], x["k"], x["index_q"], x["index_k"], BlockSelection(x["block_ids"], 128)
    ),
    "index_kl, dense": lambda x: index_kl(x["q"], x["k"], x["index_q"], x["index_k"]),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", BOUNDED)
def test_32k_tokens_fit_in_4_gb(op, dtype):
    """Compiled for the CPU, not run."""
    memory = jax.jit(BOUNDED[op]).lower(arguments(dtype)).compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total < 4e9
    assert memory.temp_size_in_bytes > visibility.CHUNK_BYTES, "the analysis must see the scores"
