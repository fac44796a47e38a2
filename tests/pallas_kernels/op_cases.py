"""Inputs and tolerances that the tests of all ops share. Few shapes, so that few are compiled.

61 tokens in blocks of 8: the last block is ragged. Four query heads in two groups.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle
from hypothesis import HealthCheck, settings

BATCH, NUM_KEYS = 2, 61
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INDEX_DIM = 4, 2, 8, 4
BLOCK_SIZE, NUM_BLOCKS, TOP_K = 8, 8, 3
INPUT_DTYPES = ("float64", "float32", "bfloat16")

# Relative to the largest element: rounding of the accumulation, or of the output for bfloat16.
TOLERANCES = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2.0**-8}
# A divergence is a small difference of entropies of up to log(61) nats.
KL_TOLERANCES = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 2.0**-8}

# Documents of 27 and 29 tokens in row 0, of 43 and 9 in row 1: more than K blocks, or fewer, with
# padding behind them.
DOCUMENTS = (((0, 27), (32, 61)), ((0, 43), (48, 57)))
SEGMENT_IDS = np.zeros((BATCH, NUM_KEYS), np.int32)
for _row, _documents in enumerate(DOCUMENTS):
    for _number, (_start, _stop) in enumerate(_documents):
        SEGMENT_IDS[_row, _start:_stop] = _number + 1

# Most of these tests' time is compilation, and most of that LLVM's optimisation.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Same examples in every run: a failure found once is found by everyone.
properties = settings(
    deadline=None,
    max_examples=8,
    database=None,
    derandomize=True,
    # float64 stays on for all examples, and a class runs its tests for several ops, as they should.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where queries and documents lie: all of the queries, or 16 cached-decode ones per row."""

    num_queries: int = NUM_KEYS
    segment_ids: np.ndarray | None = None
    query_offset: int | np.ndarray = 0

    def arguments(self):
        """For the oracle."""
        return {"segment_ids": self.segment_ids, "query_offset": self.query_offset}

    def arrays(self):
        """For the ops; what is at its default is left out."""
        return {
            name: jnp.asarray(value)
            for name, value in self.arguments().items()
            if isinstance(value, np.ndarray)
        }

    def support(self, block_ids=None, window=0):
        """The oracle's mask [B, Hkv, T, S]."""
        return numpy_oracle.support(
            BATCH,
            NUM_KV_HEADS,
            self.num_queries,
            NUM_KEYS,
            block_ids,
            BLOCK_SIZE,
            window=window,
            **self.arguments(),
        )


LAYOUTS = {
    "one document": Layout(),
    "packed": Layout(segment_ids=SEGMENT_IDS),
    "packed decode": Layout(16, SEGMENT_IDS, np.array([45, 41], np.int32)),
}
ONE_DOCUMENT, PACKED, PACKED_DECODE = LAYOUTS.values()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def integers(seed, *shape):
    """Small integers: their scores are exact in every dtype, and ties are frequent."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(float)


def rounded(dtype, *arrays):
    """The arrays as the dtype holds them: jax arrays for the op."""
    return [jnp.asarray(array, dtype) for array in arrays]


def exact(*arrays):
    """numpy float64 of what the op was given, for the oracle."""
    return [np.asarray(array, np.float64) for array in arrays]


def main_inputs(dtype, num_queries=NUM_KEYS, seed=0):
    """q, k and v."""
    return rounded(
        dtype,
        normal(seed, BATCH, num_queries, NUM_HEADS, HEAD_DIM),
        normal(seed + 1, BATCH, NUM_KEYS, NUM_KV_HEADS, HEAD_DIM),
        normal(seed + 2, BATCH, NUM_KEYS, NUM_KV_HEADS, HEAD_DIM),
    )


def index_inputs(dtype, num_queries=NUM_KEYS, seed=0, draw=normal):
    """index_q and index_k."""
    return rounded(
        dtype,
        draw(seed + 3, BATCH, num_queries, NUM_KV_HEADS, INDEX_DIM),
        draw(seed + 4, BATCH, NUM_KEYS, INDEX_DIM),
    )


def learned_blocks(layout, top_k=TOP_K):
    """Selections as an index branch makes them, by the oracle."""
    index_q, index_k = exact(*index_inputs("float32", layout.num_queries, draw=integers))
    return numpy_oracle.select_blocks(
        index_q, index_k, block_size=BLOCK_SIZE, top_k=top_k, **layout.arguments()
    )


def arbitrary_blocks(layout, seed=5):
    """Selections no index branch would make: without the own block, of the future, or empty."""
    rng = np.random.default_rng(seed)
    block_ids = np.full((BATCH, NUM_KV_HEADS, layout.num_queries, TOP_K), -1, np.int32)
    for index in np.ndindex(block_ids.shape[:3]):
        count = rng.integers(TOP_K + 1)
        block_ids[index][:count] = np.sort(rng.choice(NUM_BLOCKS, count, replace=False))
    return block_ids


def segments_of(documents, batch, num_keys):
    """The segment ids of documents (start, stop), the same in each row; None without any."""
    if not documents:
        return None
    segments = np.zeros((batch, num_keys), np.int32)
    for number, (start, stop) in enumerate(documents):
        segments[:, start:stop] = number + 1
    return segments


def ascending_picks(shape, num_blocks, count):
    """Block ids [B, Hkv, T, K]: ascending, then -1; any block, however little its query may see.

    count(rng, most) says how many a query picks.
    """
    rng = np.random.default_rng(1)
    ids = np.full(shape, -1, np.int32)
    for index in np.ndindex(shape[:3]):
        picked = count(rng, min(shape[3], num_blocks))
        ids[index][:picked] = np.sort(rng.choice(num_blocks, picked, replace=False))
    return ids


def assert_close(actual, expected, tolerances=TOLERANCES):
    """Equal up to the rounding of `actual`'s dtype; infinities must agree."""
    expected = np.asarray(expected, np.float64)
    tolerance = tolerances[str(actual.dtype)]
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        expected,
        rtol=tolerance,
        atol=tolerance * finite.max(initial=0),
    )


def finite_difference(fn, arguments, wrt, direction, step=1e-5):
    """Derivative of a numpy scalar function along `direction` of argument `wrt`, by differences."""

    def moved(distance):
        shifted = list(arguments)
        shifted[wrt] = shifted[wrt] + distance * direction
        return fn(*shifted)

    return (moved(step) - moved(-step)) / (2 * step)
