"""What must matter to no op: other documents, the future, the cache, and the order of equals."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from every_op import IMPLEMENTED, OPS, READS_NO_VALUES, edit, inputs
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BATCH,
    BLOCK_SIZE,
    DOCUMENTS,
    NUM_KEYS,
    PACKED,
    PACKED_DECODE,
    assert_close,
    compiled,
    exact,
    properties,
)

QUERIES = ("q", "index_q")
SEEDS = st.integers(0, 2**32 - 1)


@functools.partial(compiled, static_argnames=("op", "implementation", "slot"))
def run(op, implementation, x, slot=0, query_offset=None, **place):
    """`slot` is a query offset that is known to the compiler, `query_offset` one per row."""
    place["query_offset"] = slot if query_offset is None else query_offset
    return OPS[op](x, place, {"implementation": implementation})


class PlaceTests:
    """Subclass per implementation; `ops` names those of `OPS` that it serves."""

    implementation: str
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]

    def run(self, op, x, **place):
        return [np.asarray(result) for result in run(op, self.implementation, x, **place)]

    def assert_same(self, actual, expected, first_block=0):
        """Equal block ids, counted from `first_block`; numbers up to rounding."""
        for a, e in zip(actual, expected, strict=True):
            if a.dtype == np.int32:
                np.testing.assert_array_equal(np.where(a < 0, a, a - first_block), e)
            else:
                assert_close(a, e)

    def test_packed_is_each_document_alone(self, op, widest_dtype):
        x = inputs(widest_dtype)
        packed = self.run(op, x, **PACKED.arrays())
        filler = inputs(widest_dtype, seed=50)
        for spans in zip(*DOCUMENTS, strict=True):
            alone = {name: np.array(array) for name, array in filler.items()}
            for name in x:
                for row, (start, stop) in enumerate(spans):
                    alone[name][row, : stop - start] = x[name][row, start:stop]
            alone = self.run(op, edit(alone, lambda array: array))
            for row, (start, stop) in enumerate(spans):
                self.assert_same(
                    [result[row, start:stop] for result in packed],
                    [result[row, : stop - start] for result in alone],
                    first_block=start // BLOCK_SIZE,
                )

    @properties
    @given(seed=SEEDS, cut=st.integers(1, 10), number=st.integers(0, 1))
    def test_other_documents_and_future_tokens_change_nothing(
        self, op, widest_dtype, seed, cut, number
    ):
        """Not a bit: everything but the first tokens of one document per row is replaced."""
        x, other = inputs(widest_dtype), inputs(widest_dtype, seed=1 + seed % 1000)
        kept = np.zeros((BATCH, NUM_KEYS), bool)
        for row, documents in enumerate(DOCUMENTS):
            start, stop = documents[number]
            kept[row, start : min(start + cut, stop)] = True
        changed = {
            name: jnp.where(kept.reshape(*kept.shape, *[1] * (array.ndim - 2)), array, other[name])
            for name, array in x.items()
        }
        before = self.run(op, x, **PACKED.arrays())
        after = self.run(op, changed, **PACKED.arrays())
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a[kept], b[kept])
        differs = any((a != b).any() for a, b in zip(after, before, strict=True))
        assert differs == (op not in READS_NO_VALUES), "what was replaced must matter elsewhere"

    def test_cached_decoding_is_the_rows_of_the_full_call(self, op, widest_dtype):
        """With an offset per row, and keys of the future already in the slots behind."""
        x = inputs(widest_dtype)
        full = self.run(op, x, **PACKED.arrays())
        rows = PACKED_DECODE.query_offset[:, None] + np.arange(PACKED_DECODE.num_queries)
        decoded = x | {
            name: jnp.asarray(np.asarray(x[name])[np.arange(BATCH)[:, None], rows])
            for name in QUERIES
        }
        actual = self.run(op, decoded, **PACKED_DECODE.arrays())
        self.assert_same(actual, [result[np.arange(BATCH)[:, None], rows] for result in full])

    @pytest.mark.parametrize("implemented", IMPLEMENTED)
    def test_one_offset_for_all_rows(self, implemented, widest_dtype, slot=11):
        x = inputs(widest_dtype)
        full = self.run(implemented, x)
        decoded = x | {name: x[name][:, slot : slot + 16] for name in QUERIES}
        actual = self.run(implemented, decoded, slot=slot)
        self.assert_same(actual, [result[:, slot : slot + 16] for result in full])

    @properties
    @given(seed=SEEDS)
    def test_rows_are_independent(self, op, widest_dtype, seed):
        """Equal rows have equal results, and the other row has no say in them."""
        x = inputs(widest_dtype, seed=seed % 1000)
        swapped = self.run(op, edit(x, lambda array: array[::-1]))
        twice = self.run(op, edit(x, lambda array: array[[1, 1]]))
        for a, b, c in zip(self.run(op, x), swapped, twice, strict=True):
            np.testing.assert_array_equal(a[::-1], b)
            np.testing.assert_array_equal(c, a[[1, 1]])


class TestReference(PlaceTests):
    implementation = "reference"
    dtypes = ("float64",)
    ops = tuple(OPS)


@properties
@given(seed=SEEDS)
def test_the_order_of_keys_within_past_blocks_is_irrelevant(seed):
    """Selection exactly, attention and divergence up to rounding, for queries of the last block."""
    rng = np.random.default_rng(seed)
    order = np.arange(NUM_KEYS)
    for start in range(0, NUM_KEYS - BLOCK_SIZE, BLOCK_SIZE):
        rng.shuffle(order[start : start + BLOCK_SIZE])
    x = inputs("float32")
    permuted = x | {
        name: jnp.asarray(np.asarray(x[name])[:, order]) for name in ("k", "v", "index_k")
    }
    for op in IMPLEMENTED:
        before, after = (run(op, "reference", arrays) for arrays in (x, permuted))
        for a, b in zip(after, before, strict=True):
            tolerance = 0 if a.dtype == jnp.int32 else 5e-6
            last = np.s_[:, 7 * BLOCK_SIZE :]
            np.testing.assert_allclose(*exact(a[last], b[last]), atol=tolerance, rtol=tolerance)
