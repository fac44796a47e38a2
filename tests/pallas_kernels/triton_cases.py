"""Calls that the tests of the Triton kernels share: inputs, selections, and the oracle's mask."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpy_oracle
from op_cases import ascending_picks, segments_of

DOCUMENTS = ((0, 16), (16, 30), (32, 43))


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and place of one call. The interpreter takes some 10 ms per query and group."""

    per_group: int = 2
    groups: int = 1
    batch: int = 1
    num_queries: int = 20
    num_keys: int = 45
    head_dim: int = 16
    index_dim: int = 16
    block_size: int = 16
    top_k: int = 2
    query_offset: int | tuple[int, ...] = 25
    documents: tuple[tuple[int, int], ...] = ()
    dtype: str = "float32"

    def normal(self, seed, *shape):
        return np.random.default_rng(seed).normal(size=(self.batch, *shape))

    def main_inputs(self):
        queries = self.num_queries, self.groups * self.per_group, self.head_dim
        keys = self.num_keys, self.groups, self.head_dim
        return [
            jnp.asarray(self.normal(seed, *shape), self.dtype)
            for seed, shape in enumerate((queries, keys, keys))
        ]

    def index_inputs(self):
        queries = self.num_queries, self.groups, self.index_dim
        keys = self.num_keys, self.index_dim
        return [
            jnp.asarray(self.normal(seed, *shape), self.dtype)
            for seed, shape in ((3, queries), (4, keys))
        ]

    def block_ids(self):
        """Ascending, then -1: any block, of the future and of other documents too."""
        shape = self.batch, self.groups, self.num_queries, self.top_k
        num_blocks = -(-self.num_keys // self.block_size)
        return ascending_picks(shape, num_blocks, lambda rng, most: rng.integers(most + 1))

    def segment_ids(self):
        return segments_of(self.documents, self.batch, self.num_keys)

    def mask(self, block_ids):
        return numpy_oracle.support(
            self.batch,
            self.groups,
            self.num_queries,
            self.num_keys,
            block_ids,
            self.block_size,
            segment_ids=self.segment_ids(),
            query_offset=self.query_offset,
        )

    def place(self):
        """What tells the ops where queries and documents lie."""
        segments, offset = self.segment_ids(), self.query_offset
        return {
            "segment_ids": None if segments is None else jnp.asarray(segments),
            "query_offset": offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32),
        }


CASES = {
    "one head per group, from the first query": Case(1, query_offset=0, num_queries=30),
    "groups of 3, dims that are no power of two, an offset per batch row": Case(
        3, groups=2, batch=2, num_queries=9, head_dim=24, index_dim=20, query_offset=(4, 36)
    ),
    "groups of 17": Case(17, num_queries=6, query_offset=39),
    "documents with padding behind them": Case(
        num_queries=45, query_offset=0, documents=DOCUMENTS, top_k=3
    ),
    "bfloat16": Case(dtype="bfloat16"),
    "float16, blocks of 32": Case(dtype="float16", block_size=32),
}

# Relative to the largest element. Half precision multiplies rounded weights, float32 those
# that exp2 of scores in units of log2 gives.
TOLERANCES = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}


def assert_close(actual, expected, dtype):
    """Equal up to the rounding of kernels on `dtype`; infinities must agree."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[dtype] * largest)


def exact(*arrays):
    """numpy float64 of what an op was given."""
    return [np.asarray(array, np.float64) for array in arrays]
