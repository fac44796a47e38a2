"""The references work through queries in chunks: the same results, in bounded memory."""

import jax
import jax.numpy as jnp
import pytest
from every_op import OPS, assert_same, inputs, results_and_gradients
from op_cases import (
    BATCH,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KEYS,
    NUM_KV_HEADS,
    PACKED,
    compiled,
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
    "strided": PATTERN_BYTES,
    "random": PATTERN_BYTES,
    "oracle": PATTERN_BYTES,
}


@pytest.fixture
def x(double_precision):
    return inputs("float64")


@pytest.mark.parametrize("op", QUERY_BYTES)
def test_chunks_and_causal_ranges_change_nothing(op, x, monkeypatch):
    whole = results_and_gradients(op, x, **PACKED.arrays())

    with monkeypatch.context() as patched:
        chunked = count_calls(patched, jax.lax, "map")
        patched.setattr(visibility, "CHUNK_BYTES", 7 * QUERY_BYTES[op])  # a remainder of 5
        assert_same(results_and_gradients(op, x, **PACKED.arrays()), whole)
        assert (-(-NUM_KEYS // 7), BATCH, 7) in chunked, "no chunks were made"

    monkeypatch.setattr(visibility, "MIN_RANGE", 30)  # two ranges, cut within a block
    ranges = count_calls(monkeypatch, jax.numpy, "concatenate")
    assert_same(results_and_gradients(op, x, **PACKED.arrays()), whole)
    assert (BATCH, 30, NUM_KV_HEADS) in ranges or (BATCH, 30, NUM_HEADS) in ranges


def count_calls(monkeypatch, module, name):
    """Leading axes of the arrays in the last argument of every call of the function."""
    shapes, original = set(), getattr(module, name)

    def recording(*arguments, **options):
        shapes.update(a.shape[:3] for a in jax.tree.leaves(arguments) if hasattr(a, "shape"))
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, recording)
    return shapes


def test_one_query_at_a_time(x, monkeypatch):
    op = "sparse_attention"
    whole = results_and_gradients(op, x)
    monkeypatch.setattr(visibility, "CHUNK_BYTES", 1)
    assert_same(results_and_gradients(op, x), whole)


def test_causal_ranges_of_cached_decoding(x, monkeypatch):
    """An offset known to the compiler shifts every range's prefix of the keys."""
    decoded = x | {name: x[name][:, 40:60] for name in ("q", "index_q")}

    def attend(x):
        return OPS["sparse_attention"](x, {"query_offset": 40}, {})

    whole = compiled(attend)(decoded)
    monkeypatch.setattr(visibility, "MIN_RANGE", 9)
    assert_same(compiled(lambda x: attend(x))(decoded), whole)


def arguments(dtype, tokens):
    """Of the paper's shape: 64 query heads, 4 KV heads, head and index dim 128, K 16, Bk 128."""
    shapes = {"q": (64, 128), "k": (4, 128), "v": (4, 128), "index_q": (4, 128), "index_k": (128,)}
    arrays = {
        name: jax.ShapeDtypeStruct((1, tokens, *shape), dtype) for name, shape in shapes.items()
    }
    return arrays, jax.ShapeDtypeStruct((1, 4, tokens, 16), jnp.int32)


def memory(run, dtype, tokens):
    """What the CPU's compiler reserves, without running."""
    return jax.jit(run).lower(*arguments(dtype, tokens)).compile().memory_analysis()


BOUNDED = {
    "select_blocks": lambda x, ids: select_blocks(x["index_q"], x["index_k"]),
    "select_pattern": lambda x, ids: select_pattern("oracle", x["q"], x["k"]),
    "sparse_attention": lambda x, ids: sparse_attention(
        x["q"], x["k"], x["v"], BlockSelection(ids, 128)
    ),
    "dense_attention": lambda x, ids: dense_attention(x["q"], x["k"], x["v"], return_lse=True),
    "index_kl": lambda x, ids: index_kl(
        x["q"], x["k"], x["index_q"], x["index_k"], BlockSelection(ids, 128)
    ),
    "index_kl, dense": lambda x, ids: index_kl(x["q"], x["k"], x["index_q"], x["index_k"]),
}


@pytest.mark.parametrize("op", BOUNDED)
def test_32k_tokens_fit_in_4_gb(op):
    """In float32; bfloat16 takes less."""
    used = memory(BOUNDED[op], "float32", 32 * 1024)
    temporary = used.temp_size_in_bytes
    assert used.argument_size_in_bytes + used.output_size_in_bytes + temporary < 4e9
    assert temporary > visibility.CHUNK_BYTES, "the analysis must see the scores"


@pytest.mark.parametrize("op", ["sparse_attention", "index_kl"])
def test_gradients_do_not_keep_all_scores(op):
    """At 8K tokens those of 64 heads are 17 GB."""

    def gradients(x, ids):
        return jax.grad(lambda x: BOUNDED[op](x, ids)[0].astype(jnp.float32).sum())(x)

    assert memory(gradients, "bfloat16", 8 * 1024).temp_size_in_bytes < 2e9
